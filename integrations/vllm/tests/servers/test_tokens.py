"""Tokens of prefiller and decoder are those of one instance; prompts are moved, not computed."""

from __future__ import annotations

import random

from harness.models import prompt
from harness.pair import Pair
from harness.servers import ask


def _prompts(count: int, seed: int) -> list[str]:
    """Mixed lengths up to 2,000 tokens (chunks have 512); some begin with the same words."""
    generator = random.Random(seed)
    heads = [prompt(generator, 300) for _ in range(3)]
    prompts = []
    for _ in range(count):
        own = prompt(generator, generator.choice([1, 3, 10, 40, 90, 200, 400]))
        prompts.append(f"{generator.choice(heads)} {own}" if generator.random() < 0.4 else own)
    return prompts


def test_two_hundred_requests(pair: Pair) -> None:
    prompts = _prompts(200, 1)
    transferred, computed = pair.transferred(), pair.computed()
    got = pair.through_proxy(prompts, at_once=8)
    assert pair.transferred() > transferred
    assert pair.computed() == computed
    pair.wait_until_free()
    assert got == pair.alone(prompts)


def test_a_prompt_that_is_here_already_is_released_and_not_read(pair: Pair) -> None:
    words = prompt(random.Random(2), 260)
    (first,) = pair.through_proxy([words])
    before = pair.decode.metric("vllm:datadist_load_seconds_count")
    tokens = pair.prefilled(words)["remote_num_tokens"]
    aligned = words  # all whole blocks are here; the rest is less than one block
    (again,) = pair.through_proxy([aligned])
    assert again == first
    assert pair.decode.metric("vllm:datadist_load_seconds_count") <= before + 1
    assert tokens > 512
    pair.wait_until_free()


def test_parallel_samples_read_once(pair: Pair) -> None:
    words = prompt(random.Random(3), 200)
    failed = pair.decode.metric("vllm:datadist_failed_loads_total")
    body = {"prompt": words, "max_tokens": 8, "n": 3, "temperature": 1, "top_k": 1}
    texts = [choice["text"] for choice in ask(pair.proxy.url, body)["choices"]]
    (want,) = pair.alone([words], max_tokens=8)
    assert texts == [want] * 3
    assert pair.decode.metric("vllm:datadist_failed_loads_total") == failed
    pair.wait_until_free()


def test_answers_are_streamed(pair: Pair) -> None:
    import json
    import urllib.request

    words = prompt(random.Random(4), 50)
    body = {"model": "m", "prompt": words, "max_tokens": 12, "temperature": 0, "stream": True}
    request = urllib.request.Request(
        pair.proxy.url + "/v1/completions",
        json.dumps({**body, "ignore_eos": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        lines = [line for line in answer.read().decode().splitlines() if line.startswith("data: {")]
    assert len(lines) > 1
    text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines)
    assert [text] == pair.alone([words], max_tokens=12)

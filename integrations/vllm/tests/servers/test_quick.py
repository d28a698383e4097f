"""What says most in the shortest time: one pair, one restart. For CI: `make test-vllm-quick`."""

from __future__ import annotations

import random
import time

import pytest
from datadist_vllm.proxy import OUT_SECONDS
from harness.models import prompt
from harness.pair import HITS, Pair

pytestmark = pytest.mark.quick


def test_tokens_and_a_restart(pair: Pair) -> None:
    generator = random.Random(21)
    prompts = [prompt(generator, words) for words in (3, 60, 300, 900)]  # chunks have 512 tokens
    prompts += [f"{prompts[2]} {prompt(generator, words)}" for words in (2, 40)]
    got = pair.through_proxy(prompts)
    assert pair.transferred() > 0
    assert pair.computed() == 0
    assert pair.prefill.metric(HITS) > 0
    assert pair.decode.metric(HITS) > 0
    at_once = [prompt(generator, generator.choice([20, 200, 500])) for _ in range(12)]
    got += pair.through_proxy(at_once, at_once=6)
    assert pair.computed() == 0
    pair.wait_until_free()
    assert got == pair.alone(prompts + at_once)

    params = pair.prefilled(at_once[-1])
    pair.prefill.kill()
    answer = pair.decoded(at_once[-1], params)
    assert answer["choices"][0]["text"] == got[-1]
    assert pair.through_proxy(prompts[:1]) == got[:1]  # the decoder computes all
    pair.prefill.start()
    pair.prefill.wait_until_ready()
    time.sleep(OUT_SECONDS)

    prompts = [prompt(generator, 200) for _ in range(8)]
    before = pair.transferred()
    got = pair.through_proxy(prompts, at_once=4)
    assert pair.transferred() > before
    pair.wait_until_free()
    assert got == pair.alone(prompts)

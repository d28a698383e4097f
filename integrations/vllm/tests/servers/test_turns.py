"""Several turns: a prefiller reads what a decoder has of the conversation."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.models import prompt
from harness.pair import SOURCES, Pair
from harness.servers import ask

TURNS = 3


@pytest.fixture(scope="module")
def pair(directory: Path) -> Iterator[Pair]:
    """Decoders keep blocks; without prefix caching nothing else can bring a prompt's tokens."""
    extra = {"lease_seconds": 4.0, "keep_seconds": 6.0}
    with Pair("gqa", directory, extra, arguments=("--no-enable-prefix-caching",)) as pair:
        yield pair


def _turn(pair: Pair, tokens: list[int], params: dict[str, Any] | None) -> dict[str, Any]:
    body: dict[str, Any] = {"prompt": tokens, "max_tokens": 40, "return_token_ids": True}
    if params is not None:
        body["kv_transfer_params"] = params
    return ask(pair.proxy.url, body)


def test_each_turn_is_computed_once(pair: Pair) -> None:
    generator = random.Random(5)
    tokens = [generator.randrange(3, 1000) for _ in range(400)]
    params: dict[str, Any] | None = None
    for turn in range(TURNS):
        moved = pair.prefill.metric(SOURCES, source="external_kv_transfer")
        answer = _turn(pair, tokens, params)
        assert "choices" in answer, answer
        params = answer["kv_transfer_params"]
        assert params["remote_num_tokens"] == len(tokens) + 40 - 1
        got = answer["choices"][0]["token_ids"]
        alone = ask(
            pair.prefill.url, {"prompt": tokens, "max_tokens": 40, "return_token_ids": True}
        )
        assert got == alone["choices"][0]["token_ids"]
        moved = pair.prefill.metric(SOURCES, source="external_kv_transfer") - moved
        assert moved == (len(tokens) - 101 if turn else 0)
        tokens = tokens + got + [generator.randrange(3, 1000) for _ in range(100)]
    pair.wait_until_free()  # the last ones by the lease


def test_another_conversation_is_not_taken(pair: Pair) -> None:
    generator = random.Random(6)
    tokens = [generator.randrange(3, 1000) for _ in range(300)]
    params = _turn(pair, tokens, None)["kv_transfer_params"]
    other = [*tokens[:-1], tokens[-1] + 1, *[5] * 100]
    moved = pair.prefill.metric(SOURCES, source="external_kv_transfer")
    answer = _turn(pair, other, params)
    assert pair.prefill.metric(SOURCES, source="external_kv_transfer") == moved
    alone = ask(pair.prefill.url, {"prompt": other, "max_tokens": 40})
    assert answer["choices"][0]["text"] == alone["choices"][0]["text"]
    pair.wait_until_free()


def test_a_turn_after_the_lease_is_computed(pair: Pair) -> None:
    words = prompt(random.Random(7), 100)
    answer = ask(pair.proxy.url, {"prompt": words, "max_tokens": 10})
    pair.wait_until_free()
    longer = words + answer["choices"][0]["text"] + " w5 w6 w7"
    again = ask(
        pair.proxy.url,
        {"prompt": longer, "max_tokens": 10, "kv_transfer_params": answer["kv_transfer_params"]},
    )
    alone = ask(pair.prefill.url, {"prompt": longer, "max_tokens": 10})
    assert again["choices"][0]["text"] == alone["choices"][0]["text"]
    pair.wait_until_free()

"""Instances that do not fit are refused by name, the decoder computes; policy `fail`; bad settings."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.models import make_model, prompt
from harness.pair import MODELS, QUICK, SOURCES, Pair
from harness.servers import START_SECONDS, Server, ask, datadist_config, vllm_server

FAILED = "vllm:datadist_failed_loads_total"
MISFITS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "model": ("wide", (), "model is '.*/wide' here and '.*/gqa' there"),
    "dtype": (
        "gqa",
        ("--dtype", "float16"),
        "dtype is 'torch.float16' here and 'torch.float32' there",
    ),
    "block size": (
        "gqa",
        ("--block-size", "64"),
        r"cache groups is \[.*64.*\] here and \[.*128.*\] there",
    ),
    "ranks": ("gqa", ("--tensor-parallel-size", "2"), '"peer_tensor_parallel_size": 2'),
}
"""The decoder's model and arguments, and what its log says."""


@pytest.fixture(scope="module")
def pair(directory: Path) -> Iterator[Pair]:
    """Its decoder's requests fail where blocks do not come."""
    with Pair("gqa", directory, QUICK, policy="fail") as pair:
        yield pair


def _started(server: Server) -> Server:
    server.start()
    server.wait_until_ready()
    return server


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_decoder_that_does_not_fit(misfit: str, pair: Pair, directory: Path) -> None:
    kind, arguments, text = MISFITS[misfit]
    model = make_model(kind, MODELS)
    name = f"misfit-{misfit.replace(' ', '-')}"
    decode = vllm_server(name, model, directory, datadist_config(**QUICK), arguments)
    generator = random.Random(31)
    try:
        _started(decode)
        for words in (12, 150):
            each = prompt(generator, words)
            params = pair.prefilled(each)
            body = {"prompt": each, "max_tokens": 16}
            got = ask(decode.url, body | {"kv_transfer_params": params})
            assert got["choices"][0]["text"] == ask(decode.url, body)["choices"][0]["text"]
        assert decode.metric(FAILED) > 0
        assert decode.metric(SOURCES, source="external_kv_transfer") == 0
        found = [line for line in decode.log.read_text().splitlines() if re.search(text, line)]
        assert found, decode.tail()
        assert all("WARNING" in line for line in found)
    finally:
        decode.stop()
    pair.wait_until_free()


def _check_fails(pair: Pair, words: str, params: dict[str, Any]) -> None:
    answer = pair.decoded(words, params)
    assert answer["status"] == 500, answer
    assert "error" in answer["text"]


def _check_works(pair: Pair, generator: random.Random) -> None:
    words, moved = prompt(generator, 150), pair.transferred()
    assert pair.through_proxy([words]) == pair.alone([words])
    assert pair.transferred() > moved
    pair.wait_until_free()


def test_a_request_fails_where_the_policy_says_so(pair: Pair) -> None:
    generator = random.Random(32)
    words = prompt(generator, 150)
    params = pair.prefilled(words)
    other = params | {"datadist": params["datadist"] | {"key": "77"}}
    before = pair.decode.metric(FAILED)
    _check_fails(pair, words, other)
    assert pair.decode.metric(FAILED) == before + 1
    pair.wait_until_free()  # by the lease
    _check_fails(pair, words, params)
    _check_works(pair, generator)


def test_a_prefiller_that_is_gone_fails_requests(pair: Pair) -> None:
    generator = random.Random(33)
    words = prompt(generator, 150)
    params = pair.prefilled(words)
    pair.prefill.kill()
    try:
        _check_fails(pair, words, params)
        alone = pair.decoded(words, {})  # what names no prefiller is computed
        assert "choices" in alone
    finally:
        _started(pair.prefill)
    time.sleep(5)
    _check_works(pair, generator)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (datadist_config(lease_second=5), "'lease_second' is unknown, is 'lease_seconds' meant?"),
        (datadist_config(backend="shn"), "shn"),
    ],
)
def test_a_server_with_wrong_settings_does_not_start(
    config: dict[str, Any], text: str, directory: Path
) -> None:
    server = vllm_server("refused", make_model("gqa", MODELS), directory, config)
    server.start()
    try:
        until = time.monotonic() + START_SECONDS
        while server.alive() and time.monotonic() < until:
            time.sleep(0.5)
        assert not server.alive()
        assert text in server.log.read_text()
    finally:
        server.stop()

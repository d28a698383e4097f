"""Whatever fails: the tokens are right or the error is the defined one, and blocks are free again."""

from __future__ import annotations

import copy
import random
import signal
import threading
import time
from typing import Any

import pytest
from harness.models import prompt
from harness.pair import LEASE_SECONDS, WAIT_SECONDS, Pair
from harness.servers import Server, abandon

FAILED = "vllm:datadist_failed_loads_total"
RECOMPUTED = "vllm:datadist_recomputed_tokens_total"
LAPSED = "vllm:datadist_lapsed_grants_total"
generator = random.Random(11)


def _text(answer: dict[str, Any]) -> str:
    assert "choices" in answer, answer
    return str(answer["choices"][0]["text"])


def _comes_to(server: Server, name: str, value: float) -> bool:
    """Whether a metric comes to that value, in time: a step tells it, later than the answer comes."""
    until = time.monotonic() + WAIT_SECONDS
    while (found := server.metric(name)) != value and time.monotonic() < until:
        time.sleep(0.1)
    return found == value


def _check_works(pair: Pair) -> None:
    """A request goes through, by transfer."""
    words = prompt(generator, 150)
    before = pair.transferred()
    assert pair.through_proxy([words]) == pair.alone([words])
    assert pair.transferred() > before
    pair.wait_until_free()


def test_a_lease_that_is_over(pair: Pair) -> None:
    words = prompt(generator, 150)
    lapsed, recomputed = pair.prefill.metric(LAPSED), pair.decode.metric(RECOMPUTED)
    params = pair.prefilled(words)
    pair.wait_until_free()
    assert _comes_to(pair.prefill, LAPSED, lapsed + 1)
    assert _text(pair.decoded(words, params)) == pair.alone([words])[0]
    assert _comes_to(pair.decode, RECOMPUTED, recomputed + params["remote_num_tokens"])
    _check_works(pair)


def test_a_grant_is_read_once_only(pair: Pair) -> None:
    words = prompt(generator, 150)
    params = pair.prefilled(words)
    want = pair.alone([words])[0]
    assert _text(pair.decoded(words, copy.deepcopy(params))) == want
    assert _text(pair.decoded(words, copy.deepcopy(params))) == want
    pair.wait_until_free()


def test_parameters_that_are_damaged(pair: Pair) -> None:
    words = prompt(generator, 150)
    params = pair.prefilled(words)
    want = pair.alone([words])[0]
    for change in (
        {"datadist": None},
        {"remote_block_ids": [[1] * 100_000]},
        {"remote_num_tokens": 1},
        {"datadist": params["datadist"] | {"ranks": [["5", "127.0.0.1", 9]]}},
        {"datadist": params["datadist"] | {"ranks": [["5", "no address", 9]]}},
        {"datadist": params["datadist"] | {"key": "77"}},
    ):
        assert _text(pair.decoded(words, params | change)) == want, change
    other = prompt(generator, 150)
    assert _text(pair.decoded(other, params)) == pair.alone([other])[0]
    pair.wait_until_free()
    _check_works(pair)


@pytest.mark.parametrize("after", [0.0, 0.02, 0.1, 0.5])
def test_aborted_at_the_decoder(pair: Pair, after: float) -> None:
    words = prompt(generator, 600)
    params = pair.prefilled(words)
    body = {"prompt": words, "max_tokens": 500, "kv_transfer_params": params}
    abandon(pair.decode.url, body, after)
    pair.wait_until_free()
    _check_works(pair)


@pytest.mark.parametrize("after", [0.0, 0.02, 0.1, 0.5])
def test_aborted_at_the_prefiller(pair: Pair, after: float) -> None:
    asked = {"do_remote_decode": True, "do_remote_prefill": False}
    body = {"prompt": prompt(generator, 1200), "max_tokens": 1, "kv_transfer_params": asked}
    abandon(pair.prefill.url, body, after)
    pair.wait_until_free()
    _check_works(pair)


def test_many_are_aborted_through_the_proxy(pair: Pair) -> None:
    bodies = [{"prompt": prompt(generator, 300), "max_tokens": 100} for _ in range(24)]
    threads = [
        threading.Thread(target=abandon, args=(pair.proxy.url, body, generator.random() * 2))
        for body in bodies
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pair.wait_until_free()
    _check_works(pair)


def test_a_prefiller_that_is_stopped_and_goes_on(pair: Pair) -> None:
    words = prompt(generator, 150)
    want = pair.alone([words])[0]
    params = pair.prefilled(words)
    pair.prefill.signal(signal.SIGSTOP)
    try:
        assert _text(pair.decoded(words, params)) == want
    finally:
        pair.prefill.signal(signal.SIGCONT)
    pair.wait_until_free()
    _check_works(pair)


def test_a_decoder_that_is_stopped_and_goes_on(pair: Pair) -> None:
    words = prompt(generator, 150)
    params = pair.prefilled(words)
    pair.decode.signal(signal.SIGSTOP)
    time.sleep(LEASE_SECONDS + 1)
    pair.decode.signal(signal.SIGCONT)
    assert _text(pair.decoded(words, params)) == pair.alone([words])[0]
    pair.wait_until_free()
    _check_works(pair)


def test_a_prefiller_that_is_killed_and_comes_back(pair: Pair) -> None:
    words = prompt(generator, 150)
    want = pair.alone([words])[0]
    params = pair.prefilled(words)
    pair.prefill.kill()
    try:
        assert _text(pair.decoded(words, params)) == want
        other = prompt(generator, 150)  # through the proxy: the decoder computes all
        (alone,) = pair.through_proxy([other])
    finally:
        pair.prefill.start()
        pair.prefill.wait_until_ready()
    assert [alone] == pair.alone([other])
    again = pair.decoded(words, params)  # what names the one before
    assert _text(again) == want
    time.sleep(5)  # the proxy leaves it out for so long
    _check_works(pair)


def test_a_decoder_that_is_killed_and_comes_back(pair: Pair) -> None:
    words = prompt(generator, 150)
    params = pair.prefilled(words)
    body = {"prompt": words, "max_tokens": 2000, "kv_transfer_params": params}
    asking = threading.Thread(target=abandon, args=(pair.decode.url, body, 3.0))
    asking.start()
    time.sleep(1)
    pair.decode.kill()
    asking.join()
    left = pair.prefilled(prompt(generator, 150))
    assert left["remote_num_tokens"] > 0
    pair.decode.start()
    pair.decode.wait_until_ready()
    time.sleep(5)
    pair.wait_until_free()
    _check_works(pair)

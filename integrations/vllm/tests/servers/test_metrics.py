"""What ``/metrics`` counts and log lines name, of loads that succeed and of those that fail."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from harness.models import prompt
from harness.pair import Pair
from harness.servers import Server, ask

BLOCK_TOKENS = 128
BLOCK_BYTES = BLOCK_TOKENS * 4 * 4 * 32 * 2 * 4
"""4 layers, 4 heads of 32 elements, K and V, float32."""
LOADS = "vllm:datadist_load_seconds_count"
NAMES = ("bytes", "failed_loads", "recomputed_tokens", "lapsed_grants", "lost_readers")
WAIT_SECONDS = 60.0
generator = random.Random(41)


def _counts(server: Server) -> dict[str, float]:
    """All counters of the connector, and how many loads succeeded."""
    found = {name: server.metric(f"vllm:datadist_{name}_total") for name in NAMES}
    return {"loads": server.metric(LOADS), **found}


def _added(server: Server, before: dict[str, float]) -> dict[str, float]:
    """What was counted since; without zeros."""
    after = _counts(server)
    return {name: after[name] - before[name] for name in after if after[name] != before[name]}


def _wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.1)


def _line(server: Server, *parts: str) -> str:
    """The line of a log that has all of these parts."""
    lines = server.log.read_text().splitlines()
    (found,) = [line for line in lines if all(part in line for part in parts)]
    return found


def test_a_load(pair: Pair) -> None:
    words = prompt(generator, 150)
    owner, reader = _counts(pair.prefill), _counts(pair.decode)
    params = pair.prefilled(words)
    answer = pair.decoded(words, params)
    tokens = params["remote_num_tokens"]
    moved = -(-tokens // BLOCK_TOKENS) * BLOCK_BYTES
    _wait_for(lambda: _counts(pair.decode)["loads"] > reader["loads"])
    assert _added(pair.decode, reader) == {"loads": 1, "bytes": moved}
    assert pair.decode.metric("vllm:datadist_load_seconds_sum") > 0
    line = _line(pair.decode, f"request {answer['id']}", " came from ")
    assert (
        f": {tokens} tokens ({moved / 2**20:.1f} MiB) came from {params['remote_engine_id']} "
        in line
    )
    assert " over shm in " in line
    assert " INFO " in line
    summary = f"KV Transfer metrics: loads=1, MiB={moved / 2**20:.1f}, "
    _wait_for(lambda: summary in pair.decode.log.read_text())
    pair.wait_until_free()
    assert _added(pair.prefill, owner) == {}


def test_a_lease_that_has_ended(pair: Pair) -> None:
    words = prompt(generator, 150)
    owner, reader = _counts(pair.prefill), _counts(pair.decode)
    params = pair.prefilled(words)
    pair.wait_until_free()
    _wait_for(lambda: _added(pair.prefill, owner) == {"lapsed_grants": 1})
    line = _line(pair.prefill, f"request {params['remote_request_id']}: no decoder has read")
    assert " WARNING " in line
    answer = pair.decoded(words, params)
    assert "choices" in answer
    failed = {"failed_loads": 1, "recomputed_tokens": params["remote_num_tokens"]}
    _wait_for(lambda: _added(pair.decode, reader) == failed)
    line = _line(pair.decode, f"request {answer['id']}", "its blocks did not come from ")
    assert f" {params['remote_engine_id']} over shm: " in line
    assert " WARNING " in line


def test_a_peer_that_does_not_listen(pair: Pair) -> None:
    words = prompt(generator, 150)
    params = pair.prefilled(words)
    wrong: dict[str, Any] = params["datadist"] | {"ranks": [["5", "127.0.0.1", 9]]}
    reader = _counts(pair.decode)
    answer = pair.decoded(words, params | {"datadist": wrong})
    assert "choices" in answer
    failed = {"failed_loads": 1, "recomputed_tokens": params["remote_num_tokens"]}
    _wait_for(lambda: _added(pair.decode, reader) == failed)
    assert " WARNING " in _line(pair.decode, "no link with cluster 5 at 127.0.0.1:9: ")
    assert params["remote_engine_id"] in _line(pair.decode, answer["id"], "did not come from ")
    pair.wait_until_free()


def test_a_reader_that_ends(pair: Pair) -> None:
    """It has asked the stopped owner, and ends before the owner goes on: the last test of this pair."""
    first, words = prompt(generator, 50), prompt(generator, 150)
    pair.decoded(first, pair.prefilled(first))  # they are linked
    pair.wait_until_free()
    owner = _counts(pair.prefill)
    params = pair.prefilled(words)
    body = {"prompt": words, "max_tokens": 4, "kv_transfer_params": params}
    asking = threading.Thread(target=_ask, args=(pair.decode.url, body))
    pair.prefill.signal(signal.SIGSTOP)
    try:
        asking.start()
        _wait_for(lambda: pair.decode.metric("vllm:num_requests_waiting") > 0)
        time.sleep(1)  # the question is sent in the step in which the request is seen to wait
        pair.decode.kill()
    finally:
        pair.prefill.signal(signal.SIGCONT)
    asking.join()
    _wait_for(lambda: _added(pair.prefill, owner) == {"lost_readers": 1})
    line = _line(pair.prefill, f"request {params['remote_request_id']}: no decoder has read")
    assert " WARNING " in line


def _ask(url: str, body: dict[str, Any]) -> None:
    try:
        ask(url, body)
    except OSError:
        return  # the server was killed

"""Layers that their destination reads (two-sided mode): how a request ends (fetch.py)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from datadist import CacheTask, LayerSynchronizer, LLMStatusCode, TransferConfig
from tests import nodes
from tests.nodes import Node, pattern

Start = Callable[..., Node]
TENSORS, SHAPE = 2, (1, 30)
MANY = 50_000
"""Blocks of two tensors that make the most segments of one request."""


class Always(LayerSynchronizer):
    """Every layer is final."""

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return True


def _linked(start: Start, timeout: int = 20_000) -> tuple[Node, Node]:
    """A sender, whose pool has its cache only, and a target whose reads are held."""
    sender, target = start(1, sync_kv_timeout=timeout), start(2)
    for seed, node in enumerate((sender, target), 1):
        node.do(nodes.make, "c", "cache", list(SHAPE), TENSORS)
        node.do(nodes.fill, "c", seed)
    nodes.link_pair(sender, target)
    target.do(_hold)
    return sender, target


def _hold(here: nodes.Here) -> None:
    """From now on a read of the link begins, and goes on when it is told to."""
    engine = here.live._live(LLMStatusCode.LLM_FAILED)
    (domain,) = engine._all_domains()
    assert domain.attempt is not None
    link: Any = domain.attempt.link
    read = link.read
    reading, go_on = here.any["reading"], here.any["go on"] = threading.Event(), threading.Event()
    here.any["timeouts"] = []

    def held(rank: int, local: Any, remote: Any, length: Any, timeout: float) -> Any:
        here.any["timeouts"].append(timeout)
        reading.set()
        assert go_on.wait(60)
        return read(rank, local, remote, length, 20.0)

    link.read = held


def _await_reading(here: nodes.Here) -> None:
    assert here.any["reading"].wait(60)


def _go_on(here: nodes.Here) -> None:
    here.any["go on"].set()


def _timeouts(here: nodes.Here) -> list[float]:
    return list(here.any["timeouts"])


def _addresses(here: nodes.Here) -> list[int]:
    return list(here.caches["c"].tensor_addrs)


def _send(here: nodes.Here, addresses: list[int], **blocks: Any) -> None:
    here.any["task"] = here.live.cache_manager.transfer_cache_async(
        here.caches["c"], Always(), [TransferConfig(2, addresses)], **blocks
    )


def _result(here: nodes.Here) -> str:
    task: CacheTask = here.any["task"]
    return task.synchronize(60_000).name


def _pages_after_all_was_said(here: nodes.Here) -> int:
    """Pages in use once the target has heard all by now, and we its acknowledgements, if any."""
    engine = here.live._live(LLMStatusCode.LLM_FAILED)
    (view,) = engine.views.values()
    assert view.synchronize(20)
    return _pages(here)


def _pages(here: nodes.Here) -> int:
    return int(here.live.stats()["pools"]["DEVICE"]["pages_used"])


def _await_pages(here: nodes.Here) -> bool:
    deadline = time.monotonic() + 20
    while _pages(here):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def test_pages_are_kept_until_the_target_has_read_them(start_node: Start) -> None:
    """Also when the sender has given up: what it frees then may still be read."""
    sender, target = _linked(start_node, timeout=3000)  # it has asked long before
    sender.do(_send, target.do(_addresses))
    target.do(_await_reading)
    assert sender.do(_result) == "LLM_TIMEOUT"
    sender.do(nodes.deallocate, "c")
    assert sender.do(_pages_after_all_was_said) == TENSORS
    target.do(_go_on)
    assert sender.do(_await_pages)
    for index, array in enumerate(target.do(nodes.read, "c")):
        np.testing.assert_array_equal(array, pattern(1, index, SHAPE))


@pytest.mark.parametrize("good", [True, False])
def test_pages_come_back_after_the_request(start_node: Start, good: bool) -> None:
    sender, target = _linked(start_node)
    addresses = target.do(_addresses)
    sender.do(_send, addresses if good else [address + 4 for address in addresses])
    if good:
        target.do(_await_reading)
        sender.do(nodes.deallocate, "c")
        assert sender.do(_pages_after_all_was_said) == TENSORS
    target.do(_go_on)
    assert sender.do(_result) == ("LLM_SUCCESS" if good else "LLM_PARAM_INVALID")
    if not good:
        sender.do(nodes.deallocate, "c")
    assert sender.do(_await_pages)
    if good:
        (timeout,) = target.do(_timeouts)
        assert 0 < timeout <= 20


def test_a_target_that_dies_while_it_reads_is_not_waited_for(start_node: Start) -> None:
    sender, target = _linked(start_node)
    sender.do(_send, target.do(_addresses))
    target.do(_await_reading)
    target.kill()
    assert sender.do(_result) == "LLM_FAILED"  # LLM_TIMEOUT after the time limit
    assert any("the peer is gone" in line for line in sender.do(nodes.log_of, ""))


def _pins(here: nodes.Here) -> int:
    engine = here.live._live(LLMStatusCode.LLM_FAILED)
    return sum(len(cache.pins) for cache in engine.owned._caches.values())


def test_the_target_keeps_its_cache_while_it_reads(start_node: Start) -> None:
    sender, target = _linked(start_node)
    sender.do(_send, target.do(_addresses))
    target.do(_await_reading)
    assert target.do(_pins) == 1
    target.do(nodes.deallocate, "c")
    assert target.do(_pages) == TENSORS
    target.do(_go_on)
    assert sender.do(_result) == "LLM_SUCCESS"
    assert target.do(_await_pages)


def test_a_layer_of_the_most_segments(start_node: Start) -> None:
    sender, target = start_node(1, sync_kv_timeout=60_000), start_node(2)
    for node in (sender, target):
        node.do(nodes.make, "c", "blocks", [MANY + 1, 1], TENSORS)
    sender.do(nodes.fill, "c", 1)
    nodes.link_pair(sender, target)
    for count, result in ((MANY, "LLM_SUCCESS"), (MANY + 1, "LLM_PARAM_INVALID")):
        order = np.arange(count)
        blocks: dict[str, Any] = {"src_block_indices": order, "dst_block_indices": order[::-1]}
        sender.do(_send, target.do(_addresses), **blocks)
        assert sender.do(_result) == result
    for index, array in enumerate(target.do(nodes.read, "c")):
        expected = pattern(1, index, (MANY + 1, 1))[:MANY]
        np.testing.assert_array_equal(array[:MANY], expected[::-1])
        assert array[MANY] == 0
    (line,) = sender.do(nodes.log_of, "ERROR")
    assert "100002 segments is more than 100000: send fewer blocks" in line

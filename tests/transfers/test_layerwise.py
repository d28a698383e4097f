"""Asynchronous layer-wise transfers: what moves where, what ends them, what overlaps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from datadist import (
    BlocksCacheKey,
    CacheKeyByIdAndIndex,
    CacheTask,
    LayerSynchronizer,
    LLMStatusCode,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from datadist.status import LLMException
from datadist.transfers.layerwise import LayerJob, LayerSend
from tests import nodes
from tests.nodes import Node, RemoteError, pattern

Start = Callable[..., Node]
GUARD, TENSORS = 99, 6
SHAPE = (4, 30)


class Always(LayerSynchronizer):
    """Every layer is final."""

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        assert type(timeout_in_millis) is int
        assert timeout_in_millis > 0
        return True


def _send(here: nodes.Here, configs: list[Any], **blocks: Any) -> list[str | None]:
    task = here.live.cache_manager.transfer_cache_async(
        here.caches["c"], Always(), configs, **blocks
    )
    results = task.get_results(20_000)
    return [None if code is None else code.name for code in results]


def _addresses(here: nodes.Here, offset: int) -> list[int]:
    return [address + offset for address in here.caches["c"].tensor_addrs]


def _linked(start: Start, kinds: str, one_sided: bool, memory: str = "pool") -> tuple[Node, Node]:
    settings: dict[str, Any] = {"enable_remote_cache_accessible": one_sided}
    sender, target = start(1, **settings), start(2, **settings)
    mine, theirs = kinds.split()
    key = BlocksCacheKey(2, 0) if theirs == "blocks" else None
    sender.do(nodes.make, "c", mine, list(SHAPE), TENSORS, None, memory)
    target.do(nodes.make, "c", theirs, list(SHAPE), TENSORS, key, memory)
    sender.do(nodes.fill, "c", 1)
    target.do(nodes.fill, "c", GUARD)
    nodes.link_pair(sender, target)
    return sender, target


def _expect(target: Node, moved: dict[tuple[int, int], tuple[int, int]]) -> None:
    for tensor, array in enumerate(target.do(nodes.read, "c")):
        expected = pattern(GUARD, tensor, SHAPE)
        for (at, row), (source, from_row) in moved.items():
            if at == tensor:
                expected[row] = pattern(1, source, SHAPE)[from_row]
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("memory", ["pool", "numpy"])
def test_one_sided_slots(start_node: Start, memory: str) -> None:
    sender, target = _linked(start_node, "cache cache", True, memory)
    config = TransferWithCacheKeyConfig(
        CacheKeyByIdAndIndex(2, 1, 3), range(1, 3), range(0, 2), src_batch_index=2
    )
    assert sender.do(_send, [config]) == ["LLM_SUCCESS"]
    _expect(target, {(t, 3): (t + 2, 2) for t in range(4)})


@pytest.mark.parametrize("kind", [list, np.array, lambda blocks: list(np.array(blocks, np.uint8))])
def test_one_sided_blocks(start_node: Start, kind: Callable[[list[int]], Any]) -> None:
    sender, target = _linked(start_node, "blocks blocks", True)
    config = TransferWithCacheKeyConfig(BlocksCacheKey(2, 0), range(3), range(3))
    blocks = {"src_block_indices": kind([1, 3]), "dst_block_indices": kind([2, 0])}
    assert sender.do(_send, [config], **blocks) == ["LLM_SUCCESS"]
    _expect(target, {(t, d): (t, s) for t in range(TENSORS) for s, d in ((1, 2), (3, 0))})


def test_whole_blocks_caches_move_without_lists(start_node: Start) -> None:
    sender, target = _linked(start_node, "blocks blocks", True)
    config = TransferWithCacheKeyConfig(BlocksCacheKey(2, 0), range(0, 1), range(0, 1))
    assert sender.do(_send, [config]) == ["LLM_SUCCESS"]
    _expect(target, {(t, row): (t, row) for t in range(2) for row in range(4)})


@pytest.mark.parametrize(
    ("key", "slot"), [(BlocksCacheKey(2, 0), 0), (CacheKeyByIdAndIndex(2, 1, 0), 2)]
)
def test_one_sided_slot_to_blocks(start_node: Start, key: Any, slot: int) -> None:
    sender, target = _linked(start_node, "cache blocks", True)
    stride = SHAPE[1] * 4
    config = TransferWithCacheKeyConfig(key, range(3), range(3), slot)
    done = sender.do(_send, [config], dst_block_indices=[2], dst_block_memory_size=stride)
    assert done == ["LLM_SUCCESS"]
    _expect(target, {(t, 2): (t, slot) for t in range(TENSORS)})


def test_a_slot_cannot_be_set_beside_a_blocks_key() -> None:
    config = TransferWithCacheKeyConfig(BlocksCacheKey(2, 0), range(1), range(1))
    with pytest.raises(LLMException, match="must be 0") as error:
        config.src_batch_index = 1
    assert error.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    config.cache_key = CacheKeyByIdAndIndex(2, 1)
    config.src_batch_index = 1
    with pytest.raises(LLMException, match="must be 0"):
        config.cache_key = BlocksCacheKey(2, 0)
    assert isinstance(config.cache_key, CacheKeyByIdAndIndex)


@pytest.mark.parametrize("memory", ["pool", "numpy"])
def test_two_sided_addresses_are_read_by_their_owner(start_node: Start, memory: str) -> None:
    sender, target = _linked(start_node, "cache cache", False, memory)
    addresses = target.do(_addresses, SHAPE[1] * 4 * 3)
    config = TransferConfig(2, addresses[:4], range(1, 3), 2)
    assert sender.do(_send, [config]) == ["LLM_SUCCESS"]
    _expect(target, {(t, 3): (t + 2, 2) for t in range(4)})


@pytest.mark.parametrize("kind", [list, np.array, lambda blocks: list(np.array(blocks, np.uint8))])
def test_two_sided_blocks(start_node: Start, kind: Callable[[list[int]], Any]) -> None:
    sender, target = _linked(start_node, "blocks blocks", False)
    config = TransferConfig(2, target.do(_addresses, 0))
    blocks = {"src_block_indices": kind([1, 3]), "dst_block_indices": kind([2, 0])}
    assert sender.do(_send, [config], **blocks) == ["LLM_SUCCESS"]
    _expect(target, {(t, d): (t, s) for t in range(TENSORS) for s, d in ((1, 2), (3, 0))})


def test_two_sided_slot_to_blocks(start_node: Start) -> None:
    sender, target = _linked(start_node, "cache blocks", False)
    config = TransferConfig(2, target.do(_addresses, 0), src_batch_index=1)
    size = SHAPE[1] * 4
    done = sender.do(_send, [config], dst_block_indices=[3], dst_block_memory_size=size)
    assert done == ["LLM_SUCCESS"]
    _expect(target, {(t, 3): (t, 1) for t in range(TENSORS)})


def test_addresses_outside_of_live_caches_are_refused(start_node: Start) -> None:
    sender, target = _linked(start_node, "cache cache", False)
    beyond = target.do(_addresses, SHAPE[1] * 4 * 3 + 4)
    assert sender.do(_send, [TransferConfig(2, beyond)]) == ["LLM_PARAM_INVALID"]
    (line,) = sender.do(nodes.log_of, "ERROR")
    assert line.count("LLM_") == line.count("(LLM_PARAM_INVALID)") == 1
    _expect(target, {})
    target.do(nodes.deallocate, "c")
    target.do(nodes.make, "c", "cache", [1, 1], 1)
    assert sender.do(_send, [TransferConfig(2, beyond)]) == ["LLM_PARAM_INVALID"]


@pytest.mark.parametrize("one_sided", [False, True])
def test_layers_to_oneself_are_refused(start_node: Start, one_sided: bool) -> None:
    node = start_node(1, enable_remote_cache_accessible=one_sided)
    node.do(nodes.make, "c", "cache", list(SHAPE), TENSORS)
    one, two = CacheKeyByIdAndIndex(1, 1), node.do(_addresses, 0)
    layers = range(TENSORS // 2)
    config = (
        TransferWithCacheKeyConfig(one, layers, layers) if one_sided else TransferConfig(1, two)
    )
    with pytest.raises(RemoteError, match="which is this engine") as caught:
        node.do(_send, [config])
    assert caught.value.status == "LLM_PARAM_INVALID"


def test_a_dead_target_ends_the_task(start_node: Start) -> None:
    sender, target = _linked(start_node, "cache cache", True)
    target.kill()
    config = TransferWithCacheKeyConfig(CacheKeyByIdAndIndex(2, 1), range(3), range(3))
    assert sender.do(_send, [config]) == ["LLM_NOT_YET_LINK"]


# -- the job by itself -------------------------------------------------------------------------


def _task(
    moves: list[Callable[[int], None]],
    synchronize: Callable[[int], object],
    layers: int = 4,
) -> CacheTask:
    sends = [LayerSend(range(layers), move, f"target {i}") for i, move in enumerate(moves)]
    job = LayerJob(sends, synchronize)
    job.start()
    return CacheTask(job)


def test_a_layer_moves_while_the_next_is_computed() -> None:
    """Layer n is still moving when layer n + 1 is asked for: each step waits for the other one."""
    asked = [threading.Event() for _ in range(5)]
    moving = [threading.Event() for _ in range(4)]

    def move(layer: int) -> None:
        moving[layer].set()
        if layer < 3:
            assert asked[layer + 1].wait(30)

    def synchronize(layer: int) -> bool:
        asked[layer].set()
        return layer == 0 or moving[layer - 1].wait(30)

    task = _task([move], synchronize)
    assert task.synchronize(100_000) is LLMStatusCode.LLM_SUCCESS


def test_a_synchronizer_that_says_no_ends_the_task() -> None:
    moved: list[int] = []
    task = _task([moved.append], lambda layer: layer < 2)
    assert task.synchronize() is LLMStatusCode.LLM_PARAM_INVALID
    assert moved == [0, 1]


def test_a_synchronizer_that_raises_ends_the_task(caplog: pytest.LogCaptureFixture) -> None:
    moved: list[int] = []

    def synchronize(layer: int) -> bool:
        if layer == 1:
            raise ValueError("no such layer")
        return True

    task = _task([moved.append], synchronize)
    assert task.synchronize() is LLMStatusCode.LLM_FAILED
    assert task.get_results() == [LLMStatusCode.LLM_FAILED]
    assert moved == [0]
    assert "no such layer" in caplog.text


def test_a_failing_layer_stops_the_rest() -> None:
    def fail(layer: int) -> None:
        if layer == 1:
            raise LLMException("gone", status_code=LLMStatusCode.LLM_TIMEOUT)

    moved: list[int] = []
    task = _task([fail, moved.append], lambda _layer: True)
    assert task.get_results() == [LLMStatusCode.LLM_TIMEOUT, None]
    assert task.synchronize() is LLMStatusCode.LLM_TIMEOUT
    assert moved == [0]


def test_waiting_keeps_its_promise() -> None:
    release = threading.Event()
    task = _task([lambda _layer: None], lambda _layer: release.wait(20))
    began = time.monotonic()
    assert task.synchronize(50) is LLMStatusCode.LLM_TIMEOUT
    assert task.get_results(0) == [LLMStatusCode.LLM_TIMEOUT]
    assert time.monotonic() - began >= 0.05
    assert "running" in repr(task)
    release.set()
    assert task.synchronize() is LLMStatusCode.LLM_SUCCESS
    assert task.get_results(0) == [LLMStatusCode.LLM_SUCCESS]
    with pytest.raises(ValueError, match="timeout_in_millis"):
        task.synchronize(-1)


def _send_to_slot(here: nodes.Here, slot: int, layers: int, **blocks: Any) -> list[str | None]:
    key = CacheKeyByIdAndIndex(2, 1, slot)
    return _send(here, [TransferWithCacheKeyConfig(key, range(layers), range(layers))], **blocks)


def test_blocks_lead_to_blocks_only(start_node: Start) -> None:
    sender, target = _linked(start_node, "blocks cache", True)
    before = target.do(nodes.read, "c")
    assert sender.do(_send_to_slot, 3, 1) == ["LLM_PARAM_INVALID"]
    lists: dict[str, Any] = {"src_block_indices": [0], "dst_block_indices": [1]}
    assert sender.do(_send_to_slot, 0, 1, **lists) == ["LLM_PARAM_INVALID"]
    assert np.array_equal(target.do(nodes.read, "c"), before)


@pytest.mark.parametrize("slot", [SHAPE[0], 1 << 31])
def test_a_slot_that_the_source_lacks_is_not_spread(start_node: Start, slot: int) -> None:
    sender, target = _linked(start_node, "cache blocks", True)
    before = target.do(nodes.read, "c")
    with pytest.raises(RemoteError, match=f"src_batch_index is {slot}") as caught:
        sender.do(_spread, slot)
    assert caught.value.status == "LLM_PARAM_INVALID"
    assert np.array_equal(target.do(nodes.read, "c"), before)


def _spread(here: nodes.Here, slot: int) -> list[str | None]:
    key = CacheKeyByIdAndIndex(2, 1, 0)
    config = TransferWithCacheKeyConfig(key, range(1), range(1), slot)
    size = here.caches["c"].cache_desc.size // SHAPE[0]
    return _send(here, [config], dst_block_indices=[0], dst_block_memory_size=size)


class Leaving(LayerSynchronizer):
    """Ends its thread."""

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        raise SystemExit(layer_index)


def _send_and_leave(here: nodes.Here) -> str:
    key = CacheKeyByIdAndIndex(2, 1, 0)
    config = TransferWithCacheKeyConfig(key, range(1), range(1))
    task = here.live.cache_manager.transfer_cache_async(here.caches["c"], Leaving(), [config])
    return task.synchronize(100_000).name


def test_a_synchronizer_that_ends_its_thread_is_a_failure(start_node: Start) -> None:
    sender, _ = _linked(start_node, "cache cache", True)
    assert sender.do(_send_and_leave) == "LLM_FAILED"


class Stuck(LayerSynchronizer):
    """Says that the first layer is final, and waits at the second one until it is let go."""

    def __init__(self) -> None:
        self.waits, self.go = threading.Event(), threading.Event()

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        if layer_index:
            self.waits.set()
            self.go.wait(100)
        return True


def _finalize_inside(here: nodes.Here) -> list[Any]:
    """Finalize while a layer is waited for; how the task ended meanwhile."""
    key, stuck = CacheKeyByIdAndIndex(2, 1, 0), Stuck()
    config = TransferWithCacheKeyConfig(key, range(2), range(2))
    task = here.live.cache_manager.transfer_cache_async(here.caches["c"], stuck, [config])
    told = threading.Event()
    task.add_done_callback(lambda _: told.set())
    assert stuck.waits.wait(20)
    here.live.finalize()
    seen = [task.synchronize(20_000).name, told.wait(20), task.done()]
    stuck.go.set()
    return [*seen, task.synchronize(20_000).name]


def test_finalize_ends_a_task_that_waits_for_a_layer(start_node: Start) -> None:
    sender, _ = _linked(start_node, "cache cache", True)
    ended = "LLM_ENGINE_FINALIZED"
    assert sender.do(_finalize_inside) == [ended, True, True, ended]

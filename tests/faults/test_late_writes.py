"""Memory that a hung peer may still write is not reused until the peer answers or is gone."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from datadist import CacheDesc, CacheKeyByIdAndIndex, DataType, Placement
from tests import nodes
from tests.faults import scenarios
from tests.nodes import MIB, Node, RemoteError

Start = Callable[..., Node]
SHAPE, TENSORS = [1, 64 * MIB // 4], 4
PUSHED, MINE, BESIDE = 0x5A5A5A5A, 0x11111111, 0x22222222
FULL, BLOCK = 304 * MIB, 16 * MIB
SHAPE_BESIDE, POOL_BESIDE = [1, 1024], TENSORS * 4096
"""A cache behind the target, and what it takes of the pool."""
KEPT = TENSORS * 64 * MIB // BLOCK


def _fill(here: nodes.Here, label: str, value: int) -> None:
    for array in here.arrays[label]:
        array[:] = value


def _other_than(here: nodes.Here, label: str, *values: int) -> int:
    """Elements that hold none of these; looks at the margins of registered memory as well."""
    edges = here.any.get("edges", ())
    for edge in edges:
        assert (edge[: nodes.MARGIN] == nodes.EDGE).all(), "written before a tensor"
        assert (edge[-nodes.MARGIN :] == nodes.EDGE).all(), "written behind a tensor"
    return sum(int((~np.isin(array, values)).sum()) for array in here.arrays[label])


def _stop_pusher_inside(here: nodes.Here, pid: int) -> bool:
    """Stop the pusher once its first bytes have come; whether it was stopped before the last."""
    first, last = here.arrays["target"][0].reshape(-1), here.arrays["target"][-1].reshape(-1)
    deadline = time.monotonic() + 20
    while first[0] != PUSHED:
        assert time.monotonic() < deadline, "the push did not begin"
    nodes.stop(pid)
    return bool(last[-1] != PUSHED)


def _push(here: nodes.Here) -> str:
    try:
        nodes.push_cache(here, CacheKeyByIdAndIndex(1, 1, 0), "source")
    except Exception as error:
        return str(error)
    return "OK"


def _pushing(start: Start, memory: str) -> tuple[Node, Node, int]:
    """An owner, and a pusher that is stopped in the middle of its copy."""
    settings: dict[str, Any] = {
        "enable_remote_cache_accessible": True, "pool": FULL + POOL_BESIDE, "sync_kv_timeout": 2000,
    }  # fmt: skip
    owner, pusher = start(1, **settings), start(2, **settings)
    owner.do(nodes.make, "target", "cache", SHAPE, TENSORS, None, memory)
    owner.do(nodes.make, "beside", "cache", SHAPE_BESIDE, TENSORS)
    owner.do(_fill, "beside", BESIDE)
    pusher.do(nodes.make, "source", "cache", SHAPE, TENSORS)
    pusher.do(_fill, "source", PUSHED)
    comm_id, _ = nodes.link_pair(owner, pusher)
    for _ in range(10):
        owner.do(_fill, "target", 0)
        owner.begin(_stop_pusher_inside, pusher.pid)
        pusher.begin(_push)
        if owner.result():
            assert owner.do(_other_than, "target", 0, PUSHED) == 0
            _check_beside(owner)
            return owner, pusher, comm_id
        pusher.resume()
        pusher.result()
    pytest.fail("the pusher was never stopped in mid-copy")


def _check_beside(owner: Node, pusher: Node | None = None) -> None:
    """What lies beside the target is as it was, and so is what is pushed, where that lives."""
    assert owner.do(_other_than, "beside", BESIDE) == 0
    if pusher is not None:
        assert pusher.do(_other_than, "source", PUSHED) == 0


def _reuse(here: nodes.Here) -> tuple[str, int]:
    """Free the target, and take what memory can be had."""
    nodes.deallocate(here, "target")
    return _take_all(here)


def _take_all(here: nodes.Here) -> tuple[str, int]:
    """Allocate and fill until there is no more; how that was refused, and the number."""
    desc = CacheDesc(1, [1, BLOCK // 4], DataType.DT_INT32, Placement.DEVICE)
    for count in itertools.count():
        try:
            cache = here.live.cache_manager.allocate_cache(desc)
        except Exception as error:
            return str(error), count
        label = f"new {cache.cache_id}"
        here.caches[label], here.arrays[label] = cache, cache.numpy()
        _fill(here, label, MINE)
    raise AssertionError("never reached")


def _check_new(owner: Node) -> None:
    """Nobody wrote what was allocated since, nor what lies beside the target."""
    assert owner.do(_changed) == 0
    _check_beside(owner)


def _changed(here: nodes.Here) -> int:
    return sum(_other_than(here, label, MINE) for label in here.arrays if label.startswith("new"))


def test_pool_memory_under_a_stopped_pusher_is_kept(start_node: Start) -> None:
    owner, pusher, comm_id = _pushing(start_node, "pool")
    owner.do(nodes.unlink, comm_id)
    assert any("may still write our memory" in line for line in owner.do(nodes.log_of))
    refused, count = owner.do(_reuse)
    assert "wait for confirmations of peers" in refused
    assert count == FULL // BLOCK - KEPT
    pusher.resume()
    assert pusher.result() != "OK"
    _check_beside(owner, pusher)
    _check_new(owner)
    refused, more = _retry(owner)  # it answered: its memory is back
    assert more == KEPT
    _check_new(owner)


def _retry(owner: Node) -> tuple[str, int]:
    total, deadline = 0, time.monotonic() + 30
    while True:
        refused, count = owner.do(_take_all)
        total += count
        if total >= KEPT or time.monotonic() > deadline:
            return refused, total


def test_pool_memory_under_a_pusher_that_dies_returns(start_node: Start) -> None:
    owner, pusher, comm_id = _pushing(start_node, "pool")
    owner.do(nodes.unlink, comm_id)
    refused, _ = owner.do(_reuse)
    assert "wait for confirmations of peers" in refused
    pusher.kill()
    assert _retry(owner)[1] == KEPT
    _check_new(owner)


def test_registered_memory_under_a_stopped_pusher_stays_registered(start_node: Start) -> None:
    owner, pusher, comm_id = _pushing(start_node, "numpy")
    for _ in range(2):
        with pytest.raises(RemoteError, match="did not confirm that it has stopped") as error:
            owner.do(nodes.unregister, "target")
        assert error.value.status == "LLM_FAILED"
    pusher.resume()
    pusher.result()
    assert owner.do(_other_than, "target", 0, PUSHED) == 0
    _check_beside(owner, pusher)
    owner.do(nodes.unregister, "target")
    owner.do(_fill, "target", MINE)
    assert owner.do(_other_than, "target", MINE) == 0
    owner.do(nodes.unlink, comm_id)


def test_pool_memory_under_a_stopped_pusher_whose_connection_is_lost(start_node: Start) -> None:
    owner, pusher, comm_id = _pushing(start_node, "pool")
    owner.do(scenarios.give_up)
    refused, count = owner.do(_reuse)
    assert "wait for confirmations of peers" in refused
    assert count == FULL // BLOCK - KEPT
    pusher.resume()
    assert pusher.result() != "OK"
    _check_beside(owner, pusher)
    _check_new(owner)
    owner.do(nodes.unlink, comm_id)  # closing the link finds that nobody is inside
    assert _retry(owner)[1] == KEPT
    _check_new(owner)


def test_a_stopped_pusher_whose_connection_is_lost_and_that_dies(start_node: Start) -> None:
    owner, pusher, comm_id = _pushing(start_node, "pool")
    owner.do(scenarios.give_up)
    owner.do(nodes.unlink, comm_id)
    refused, _ = owner.do(_reuse)
    assert "wait for confirmations of peers" in refused
    pusher.kill()
    assert _retry(owner)[1] == KEPT
    _check_new(owner)

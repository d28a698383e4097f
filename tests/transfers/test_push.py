"""Pushes between real processes: every byte that must move, and no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from datadist import BlocksCacheKey, CacheKeyByIdAndIndex
from tests import nodes
from tests.nodes import Node, RemoteError, pattern

Start = Callable[..., Node]
TENSORS, GUARD = 4, 99


def _linked(start: Start, shape: list[int], kind: str, memory: str) -> tuple[Node, Node]:
    """A pusher (cluster 1) and a target (cluster 2), each with a cache "c", filled."""
    pusher, target = start(1, local_comm_res=""), start(2, local_comm_res="")
    mine, theirs = memory.split()
    key = BlocksCacheKey(2, 0) if kind == "blocks" else None
    pusher.do(nodes.make, "c", kind, shape, TENSORS, None, mine)
    target.do(nodes.make, "c", kind, shape, TENSORS, key, theirs)
    pusher.do(nodes.fill, "c", 1)
    target.do(nodes.fill, "c", GUARD)
    nodes.link_pair(pusher, target)
    return pusher, target


def _expect(
    target: Node, shape: tuple[int, ...], moved: dict[tuple[int, int], tuple[int, int]]
) -> None:
    """``moved``: (tensor, row) of the target from (tensor, row) of the source; the rest untouched."""
    actual = target.do(nodes.read, "c")
    for tensor, array in enumerate(actual):
        expected = pattern(GUARD, tensor, shape)
        for (at, row), (source, from_row) in moved.items():
            if at == tensor:
                expected[row] = pattern(1, source, shape)[from_row]
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("memory", ["pool pool", "numpy numpy", "pool numpy", "numpy pool"])
def test_a_slot_is_pushed(start_node: Start, memory: str) -> None:
    pusher, target = _linked(start_node, [3, 50], "cache", memory)
    pusher.do(nodes.push_cache, CacheKeyByIdAndIndex(2, 1, 2), "c", 1)
    _expect(target, (3, 50), {(t, 2): (t, 1) for t in range(TENSORS)})


def test_a_slot_goes_to_the_beginning_of_a_larger_one(start_node: Start) -> None:
    pusher, target = _linked(start_node, [3, 80], "cache", "pool pool")
    pusher.do(nodes.make, "narrow", "cache", [4, 50], TENSORS)
    pusher.do(nodes.fill, "narrow", 1)
    pusher.do(nodes.push_cache, CacheKeyByIdAndIndex(2, 1, 1), "narrow", 3)
    for tensor, array in enumerate(target.do(nodes.read, "c")):
        expected = pattern(GUARD, tensor, (3, 80))
        expected[1, :50] = pattern(1, tensor, (4, 50))[3]
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("memory", ["pool pool", "numpy numpy"])
def test_blocks_are_pushed(start_node: Start, memory: str) -> None:
    pusher, target = _linked(start_node, [40, 30], "blocks", memory)
    source, goal = [0, 1, 2, 7, 30, *range(10, 20)], [5, 6, 7, 0, 39, *range(20, 30)]
    pusher.do(nodes.push_blocks, BlocksCacheKey(2, 0), "c", source, goal)
    moved = {(t, d): (t, s) for t in range(TENSORS) for s, d in zip(source, goal, strict=True)}
    _expect(target, (40, 30), moved)


def test_layers_go_where_the_ranges_say(start_node: Start) -> None:
    pusher, target = _linked(start_node, [3, 50], "cache", "pool pool")
    pusher.do(
        nodes.push_cache,
        CacheKeyByIdAndIndex(2, 1),
        "c",
        src_layer_range=range(1, 2),
        dst_layer_range=range(0, 1),
    )
    _expect(target, (3, 50), {(0, 0): (2, 0), (1, 0): (3, 0)})
    pusher.do(
        nodes.push_cache,
        CacheKeyByIdAndIndex(2, 1),
        "c",
        src_layer_range=range(0, 1),
        dst_layer_range=range(3, 4),
        tensor_num_per_layer=1,
    )
    _expect(target, (3, 50), {(0, 0): (2, 0), (1, 0): (3, 0), (3, 0): (0, 0)})


def test_wrong_pushes_change_nothing(start_node: Start) -> None:
    pusher, target = _linked(start_node, [3, 50], "cache", "pool pool")
    pusher.do(nodes.make, "wide", "cache", [3, 60], TENSORS)
    cases: list[tuple[CacheKeyByIdAndIndex, str, dict[str, Any], str]] = [
        (CacheKeyByIdAndIndex(2, 7), "c", {}, "LLM_KV_CACHE_NOT_EXIST"),
        (CacheKeyByIdAndIndex(3, 1), "c", {}, "LLM_NOT_YET_LINK"),
        (CacheKeyByIdAndIndex(1, 1), "c", {}, "LLM_PARAM_INVALID"),
        (CacheKeyByIdAndIndex(2, 1, 3), "c", {}, "LLM_PARAM_INVALID"),
        (CacheKeyByIdAndIndex(2, 1), "c", {"src_batch_index": 3}, "LLM_PARAM_INVALID"),
        (CacheKeyByIdAndIndex(2, 1), "c", {"dst_layer_range": range(1, 3)}, "LLM_PARAM_INVALID"),
        (CacheKeyByIdAndIndex(2, 1), "c", {"tensor_num_per_layer": 5}, "LLM_PARAM_INVALID"),
        (CacheKeyByIdAndIndex(2, 1), "c", {"tensor_num_per_layer": 3}, "LLM_PARAM_INVALID"),
        (CacheKeyByIdAndIndex(2, 1), "wide", {}, "LLM_PARAM_INVALID"),
    ]
    for key, label, options, status in cases:
        with pytest.raises(RemoteError) as error:
            pusher.do(nodes.push_cache, key, label, **options)
        assert error.value.status == status, (key, label, options, error.value.text)
    _expect(target, (3, 50), {})
    pusher.do(nodes.push_cache, CacheKeyByIdAndIndex(2, 1), "c")


def test_a_target_that_registered_for_itself_only_is_refused(start_node: Start) -> None:
    pusher, target = start_node(1, local_comm_res=""), start_node(2, local_comm_res="")
    pusher.do(nodes.make, "c", "blocks", [8, 10])
    target.do(
        nodes.make,
        "c",
        "blocks",
        [8, 10],
        4,
        BlocksCacheKey(2, 0),
        "numpy",
        remote_accessible=False,
    )
    nodes.link_pair(pusher, target)
    with pytest.raises(RemoteError) as error:
        pusher.do(nodes.push_blocks, BlocksCacheKey(2, 0), "c", [0], [0])
    assert error.value.status == "LLM_PARAM_INVALID"
    assert "not remote accessible" in error.value.text


def test_freed_memory_is_not_pushed_into(start_node: Start) -> None:
    pusher, target = _linked(start_node, [3, 50], "cache", "pool pool")
    target.do(nodes.deallocate, "c")
    with pytest.raises(RemoteError) as error:
        pusher.do(nodes.push_cache, CacheKeyByIdAndIndex(2, 1), "c")
    assert error.value.status == "LLM_KV_CACHE_NOT_EXIST"

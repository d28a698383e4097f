"""Pulls between real processes: every byte that must move, and no other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from datadist import (
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
    LLMException,
    LLMStatusCode,
)
from datadist.transfers.pull import plan_pairs
from tests import nodes
from tests.nodes import Node, RemoteError, pattern

SLOTS, BLOCKS, WIDTH, TENSORS = 3, 12, 40, 4
GUARD = 99

Start = Callable[..., Node]
Arrays = Sequence[NDArray[np.int32]]


def _linked(
    start: Start, before: Callable[[Node, Node], None], **settings: Any
) -> tuple[Node, Node]:
    """An owner (cluster 1) and a puller (cluster 2); ``before`` makes caches, then they link."""
    owner, puller = start(1, **settings), start(2, **settings)
    before(owner, puller)
    nodes.link_pair(owner, puller)
    return owner, puller


def _guard(node: Node, label: str) -> list[NDArray[np.int32]]:
    node.do(nodes.fill, label, GUARD)
    return [pattern(GUARD, i, a.shape) for i, a in enumerate(node.do(nodes.read, label))]


def _same(actual: Arrays, expected: Arrays) -> None:
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("memory", ["pool pool", "numpy numpy", "pool numpy", "numpy pool"])
def test_contiguous_to_contiguous(start_node: Start, memory: str, one_sided: bool) -> None:
    theirs, mine = memory.split()

    def before(owner: Node, puller: Node) -> None:
        owner.do(nodes.make, "src", "cache", [SLOTS, WIDTH], TENSORS, None, theirs)
        puller.do(nodes.make, "dst", "cache", [SLOTS, WIDTH], TENSORS, None, mine)

    owner, puller = _linked(start_node, before, enable_remote_cache_accessible=one_sided)
    owner.do(nodes.fill, "src", 1)
    expected = _guard(puller, "dst")
    puller.do(nodes.pull_cache, CacheKeyByIdAndIndex(1, 1, 2), "dst", 1)
    for index, array in enumerate(expected):
        array[1] = pattern(1, index, (SLOTS, WIDTH))[2]
    _same(puller.do(nodes.read, "dst"), expected)
    puller.do(nodes.pull_cache, CacheKeyByIdAndIndex(1, 1, 0), "dst", 0, 20)
    for index, array in enumerate(expected):
        array[0, :5] = pattern(1, index, (SLOTS, WIDTH))[0, :5]
    _same(puller.do(nodes.read, "dst"), expected)


@pytest.mark.parametrize("memory", ["pool pool", "numpy numpy", "pool numpy", "numpy pool"])
def test_blocks_to_blocks(start_node: Start, memory: str) -> None:
    theirs, mine = memory.split()

    def before(owner: Node, puller: Node) -> None:
        key = BlocksCacheKey(1, 7)
        owner.do(nodes.make, "src", "blocks", [BLOCKS, WIDTH], TENSORS, key, theirs)
        puller.do(nodes.make, "dst", "blocks", [BLOCKS, WIDTH], TENSORS, None, mine)

    owner, puller = _linked(start_node, before)
    owner.do(nodes.fill, "src", 1)
    expected = _guard(puller, "dst")
    source, target = [0, 1, 2, 9, 5, 6, 11], [4, 5, 6, 0, 9, 10, 2]
    for _ in range(2):  # blocks keys are not consumed
        puller.do(nodes.pull_blocks, BlocksCacheKey(1, 7), "dst", source, target)
    for index, array in enumerate(expected):
        array[target] = pattern(1, index, (BLOCKS, WIDTH))[source]
    _same(puller.do(nodes.read, "dst"), expected)


@pytest.mark.parametrize("memory", ["pool pool", "numpy numpy", "pool numpy", "numpy pool"])
def test_contiguous_to_blocks_with_a_short_last_block(start_node: Start, memory: str) -> None:
    width, block = 44, 8  # a slot fills five blocks and a half
    theirs, mine = memory.split()

    def before(owner: Node, puller: Node) -> None:
        owner.do(nodes.make, "src", "cache", [2, width], TENSORS, None, theirs)
        puller.do(nodes.make, "dst", "blocks", [BLOCKS, block], TENSORS, None, mine)

    owner, puller = _linked(start_node, before)
    owner.do(nodes.fill, "src", 1)
    expected = _guard(puller, "dst")
    target = [7, 8, 1, 11, 0, 4]
    puller.do(nodes.pull_blocks, CacheKeyByIdAndIndex(1, 1, 1), "dst", [], target)
    for index, array in enumerate(expected):
        slot = pattern(1, index, (2, width))[1]
        for place, number in enumerate(target):
            part = slot[place * block : (place + 1) * block]
            array[number, : len(part)] = part
    _same(puller.do(nodes.read, "dst"), expected)
    with pytest.raises(RemoteError, match="list at most 6") as caught:
        puller.do(
            nodes.pull_blocks, CacheKeyByIdAndIndex(1, 1, 1), "dst", [], [0, 1, 2, 3, 4, 5, 6]
        )
    assert caught.value.status == "LLM_PARAM_INVALID"


def test_layer_ranges_move_these_tensors_only(start_node: Start) -> None:
    def before(owner: Node, puller: Node) -> None:
        owner.do(nodes.make, "src", "cache", [SLOTS, WIDTH], 8)
        puller.do(nodes.make, "dst", "cache", [SLOTS, WIDTH], 8)

    owner, puller = _linked(start_node, before)
    owner.do(nodes.fill, "src", 1)
    expected = _guard(puller, "dst")
    puller.do(_pull_layers, CacheKeyByIdAndIndex(1, 1, 0), range(1, 3), range(2, 4))
    for moved in range(4):
        expected[4 + moved][0] = pattern(1, 2 + moved, (SLOTS, WIDTH))[0]
    _same(puller.do(nodes.read, "dst"), expected)
    for source, target in (
        (range(1, 3), range(2, 5)),
        (range(3, 5), range(0, 2)),
        (range(1, 2), None),
    ):
        with pytest.raises(RemoteError) as caught:
            puller.do(_pull_layers, CacheKeyByIdAndIndex(1, 1, 0), source, target)
        assert caught.value.status == "LLM_PARAM_INVALID"
    _same(puller.do(nodes.read, "dst"), expected)


@pytest.mark.parametrize("memory", ["pool", "numpy"])
def test_layer_ranges_of_blocks(start_node: Start, memory: str) -> None:
    def before(owner: Node, puller: Node) -> None:
        key = BlocksCacheKey(1, 0)
        owner.do(nodes.make, "src", "blocks", [BLOCKS, WIDTH], 6, key, memory)
        puller.do(nodes.make, "dst", "blocks", [BLOCKS, WIDTH], 6, None, memory)

    owner, puller = _linked(start_node, before)
    owner.do(nodes.fill, "src", 1)
    expected = _guard(puller, "dst")
    ranges: dict[str, Any] = {"src_layer_range": range(1, 2), "dst_layer_range": range(0, 1)}
    puller.do(
        nodes.pull_blocks,
        BlocksCacheKey(1, 0),
        "dst",
        [3, 4],
        [7, 0],
        tensor_num_per_layer=3,
        **ranges,
    )
    for tensor in range(3):
        expected[tensor][[7, 0]] = pattern(1, tensor + 3, (BLOCKS, WIDTH))[[3, 4]]
    _same(puller.do(nodes.read, "dst"), expected)


def _pull_layers(here: nodes.Here, key: Any, source: range | None, target: range | None) -> None:
    nodes.pull_cache(here, key, "dst", src_layer_range=source, dst_layer_range=target)


def test_request_keys_are_consumed_and_prefix_keys_are_not(start_node: Start) -> None:
    def before(owner: Node, puller: Node) -> None:
        keys = [CacheKey(1, 10), CacheKey(1, 0, 0, 20)]
        owner.do(nodes.make, "src", "cache", [2, WIDTH], TENSORS, keys)
        puller.do(nodes.make, "dst", "cache", [2, WIDTH], TENSORS)

    owner, puller = _linked(start_node, before)
    owner.do(nodes.fill, "src", 1)
    owner.do(nodes.deallocate, "src")
    puller.do(nodes.pull_cache, CacheKey(1, 10), "dst")
    with pytest.raises(RemoteError, match="was pulled already") as caught:
        puller.do(nodes.pull_cache, CacheKey(1, 10), "dst")
    assert caught.value.status == "LLM_KV_CACHE_NOT_EXIST"
    prefix = CacheKey(1, 2**64 - 1, 0, 20)
    for _ in range(2):
        puller.do(nodes.pull_cache, prefix, "dst")
    owner.do(_remove_key, CacheKey(1, 0, 0, 20))
    with pytest.raises(RemoteError) as caught:
        puller.do(nodes.pull_cache, prefix, "dst")
    assert caught.value.status == "LLM_KV_CACHE_NOT_EXIST"
    owner.do(_fill_the_pool)


def _remove_key(here: nodes.Here, key: CacheKey) -> None:
    here.live.cache_manager.remove_cache_key(key)


def _fill_the_pool(here: nodes.Here) -> None:
    """All memory came back: one cache can have the whole pool."""
    nodes.make(here, "all", "cache", [1, 2 << 20], 1)


def test_a_key_is_consumed_once_all_layers_were_pulled(start_node: Start) -> None:
    def before(owner: Node, puller: Node) -> None:
        owner.do(nodes.make, "src", "cache", [1, WIDTH], 4, [CacheKey(1, 10)])
        puller.do(nodes.make, "dst", "cache", [1, WIDTH], 4)

    _, puller = _linked(start_node, before)
    for layer in (range(0, 1), range(1, 2)):
        puller.do(_pull_layers, CacheKey(1, 10), layer, layer)
    with pytest.raises(RemoteError) as caught:
        puller.do(_pull_layers, CacheKey(1, 10), range(0, 1), range(0, 1))
    assert caught.value.status == "LLM_KV_CACHE_NOT_EXIST"


def test_all_ordered_pairs_of_four_clusters_and_two_domains(start_node: Start) -> None:
    mapping = {cluster: cluster - 1 for cluster in range(1, 5)}
    group = [start_node(cluster) for cluster in mapping]
    for name in ("one", "two"):
        for node in group:
            node.begin(nodes.link_and_wait, name, mapping)
        for node in group:
            node.result()
    for cluster, node in enumerate(group, 1):
        node.do(nodes.make, "src", "cache", [SLOTS, WIDTH], TENSORS)
        node.do(nodes.make, "dst", "cache", [SLOTS, WIDTH], TENSORS)
        node.do(nodes.fill, "src", cluster)
    for cluster, node in enumerate(group, 1):
        for other in mapping.keys() - {cluster}:
            expected = _guard(node, "dst")
            node.do(nodes.pull_cache, CacheKeyByIdAndIndex(other, 1, 1), "dst", 0)
            for index, array in enumerate(expected):
                array[0] = pattern(other, index, (SLOTS, WIDTH))[1]
            _same(node.do(nodes.read, "dst"), expected)
    group[0].do(nodes.unlink, 2)  # the older domain still leads to the same peers
    group[0].do(nodes.pull_cache, CacheKeyByIdAndIndex(3, 1, 1), "dst", 0)


def test_memory_registered_after_link_needs_a_new_link(start_node: Start) -> None:
    owner, puller = _linked(start_node, lambda _owner, _puller: None)
    owner.do(nodes.make, "late", "cache", [1, WIDTH], 2, None, "numpy")
    puller.do(nodes.make, "dst", "cache", [1, WIDTH], 2)
    key = CacheKeyByIdAndIndex(1, 1, 0)
    with pytest.raises(RemoteError, match="unlink and link again") as caught:
        puller.do(nodes.pull_cache, key, "dst")
    assert caught.value.status == "LLM_PARAM_INVALID"
    for node in (owner, puller):
        node.do(nodes.unlink, 1)
    nodes.link_pair(owner, puller)
    puller.do(nodes.pull_cache, key, "dst")


def test_an_owner_that_computes_is_pulled_from(start_node: Start, tmp_path: Path) -> None:
    def before(owner: Node, puller: Node) -> None:
        owner.do(nodes.make, "src", "cache", [SLOTS, WIDTH], TENSORS)
        puller.do(nodes.make, "dst", "cache", [SLOTS, WIDTH], TENSORS)

    owner, puller = _linked(start_node, before)
    begun, enough = tmp_path / "begun", tmp_path / "enough"
    owner.begin(_compute, begun, enough)
    while not begun.exists():
        time.sleep(0.001)
    puller.do(_many_pulls, 200)  # would wait for the owner, which computes until they have ended
    enough.touch()
    assert owner.result(), "it has computed all the time"


def _compute(_here: nodes.Here, begun: Path, enough: Path) -> bool:
    """Compute until the other file is there; whether it came before a minute had passed."""
    begun.touch()
    deadline = time.monotonic() + nodes.SECONDS
    while not enough.exists():
        if time.monotonic() > deadline:
            return False
        sum(range(1000))
    return True


def _many_pulls(here: nodes.Here, count: int) -> None:
    for _ in range(count):
        nodes.pull_cache(here, CacheKeyByIdAndIndex(1, 1, 0), "dst")


def test_wrong_pulls_change_nothing(start_node: Start) -> None:
    def before(owner: Node, puller: Node) -> None:
        owner.do(nodes.make, "src", "cache", [SLOTS, WIDTH], TENSORS)
        owner.do(nodes.make, "blocks", "blocks", [BLOCKS, WIDTH], TENSORS, BlocksCacheKey(1))
        puller.do(nodes.make, "dst", "cache", [SLOTS, WIDTH], TENSORS)
        puller.do(nodes.make, "blocks", "blocks", [BLOCKS, WIDTH], TENSORS)

    _, puller = _linked(start_node, before)
    expected = _guard(puller, "dst")
    by_id = CacheKeyByIdAndIndex
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((by_id(1, 9, 0), "dst"), "LLM_KV_CACHE_NOT_EXIST"),
        ((by_id(1, 1, 3), "dst"), "LLM_KV_CACHE_NOT_EXIST"),
        ((by_id(1, 1, 0), "dst", 3), "LLM_PARAM_INVALID"),
        ((by_id(1, 1, 0), "dst", 0, WIDTH * 4 + 1), "LLM_PARAM_INVALID"),
        ((by_id(1, 1, 0), "dst", 0, 0), "LLM_PARAM_INVALID"),
        ((by_id(2, 1, 0), "dst"), "LLM_PARAM_INVALID"),
        ((by_id(3, 1, 0), "dst"), "LLM_NOT_YET_LINK"),
        ((by_id(1, 2, 0), "dst"), "LLM_PARAM_INVALID"),
        ((by_id(1, 1, 0), "blocks"), "LLM_PARAM_INVALID"),
        ((CacheKey(1, 5, 0, 6), "dst"), "LLM_PARAM_INVALID"),
    ]
    for args, expected_status in cases:
        with pytest.raises(RemoteError) as caught:
            puller.do(nodes.pull_cache, *args)
        assert caught.value.status == expected_status, args
    key = BlocksCacheKey(1)
    for source, target in (([0], [BLOCKS]), ([BLOCKS], [0]), ([0, 1], [0]), ([], [0]), ([0], [])):
        with pytest.raises(RemoteError) as caught:
            puller.do(nodes.pull_blocks, key, "blocks", source, target)
        assert caught.value.status == "LLM_PARAM_INVALID"
    _same(puller.do(nodes.read, "dst"), expected)


@pytest.mark.parametrize("method", [nodes.pull_blocks, nodes.push_blocks])
def test_misspelt_layers_move_nothing(start_node: Start, method: Callable[..., None]) -> None:
    key = BlocksCacheKey(1, 7)

    def before(owner: Node, puller: Node) -> None:
        owner.do(nodes.make, "theirs", "blocks", [BLOCKS, WIDTH], TENSORS, key)
        puller.do(nodes.make, "mine", "blocks", [BLOCKS, WIDTH], TENSORS)

    owner, puller = _linked(start_node, before, enable_remote_cache_accessible=True)
    puller.do(method, key, "mine", [0], [0])  # goes the short way from now on
    owner.do(nodes.fill, "theirs", 1)
    expected = _guard(puller, "mine")
    for name in ("src_layers", "dst_layer", "tensors_per_layer"):
        options: dict[str, Any] = {name: range(0, 1)}
        with pytest.raises(RemoteError, match=f"unexpected keyword argument '{name}'") as caught:
            puller.do(method, key, "mine", [1], [2], **options)
        assert caught.value.kind == "TypeError"
        assert "src_layer_range, dst_layer_range, tensor_num_per_layer" in caught.value.text
    _same(puller.do(nodes.read, "mine"), expected)
    _same(owner.do(nodes.read, "theirs"), [pattern(1, i, (BLOCKS, WIDTH)) for i in range(TENSORS)])


def test_a_list_that_another_thread_has_changed_since_it_was_checked_is_refused() -> None:
    layout = SimpleNamespace(block_bytes=64, bases=(1 << 40,), stride=64)
    entry = SimpleNamespace(cache_id=2, block_bytes=64, bases=[1 << 50], stride=64, count=BLOCKS)
    mine, theirs = (SimpleNamespace(layout=layout, cache_id=1), SimpleNamespace(entry=entry))
    first = slice(0, 1)
    with pytest.raises(LLMException, match="differ in length") as caught:
        plan_pairs(cast("Any", mine), cast("Any", theirs), first, first, [1], [1, 2])
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID

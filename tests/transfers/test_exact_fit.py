"""What fits exactly is accepted and moved whole: the last slot, block, layer, byte and page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from datadist import BlocksCacheKey, CacheDesc, CacheKeyByIdAndIndex, DataType
from tests import nodes
from tests.nodes import MIB, Node, RemoteError, pattern

Start = Callable[..., Node]
PAGE, SLOTS, BLOCKS = 4096, 4, 16
WIDTH = PAGE // 4 // SLOTS
"""Numbers of a slot, of which SLOTS fill a page."""
PER_BLOCK = WIDTH // 4
TENSORS = 10
"""More than plain Python plans: 8."""
POOL = 2 * TENSORS * PAGE
"""One contiguous cache and one of blocks, and no page more."""


def _refused(node: Node, function: Callable[..., Any], *args: Any, **options: Any) -> str:
    with pytest.raises(RemoteError) as caught:
        node.do(function, *args, **options)
    return str(caught.value)


def _fill_pool(node: Node, key: BlocksCacheKey) -> None:
    node.do(nodes.make, "slots", "cache", [SLOTS, WIDTH], TENSORS)
    node.do(nodes.make, "blocks", "blocks", [BLOCKS, PER_BLOCK], TENSORS, key)
    text = _refused(node, nodes.make, "more", "cache", [1, 1], 1)
    assert "LLM_OUT_OF_MEMORY" in text
    assert f"0 of {2 * TENSORS} are free" in text


def _expect(node: Node, label: str, shape: tuple[int, int], moved: dict[int, Any]) -> None:
    """``moved``: the numbers of a row, per tensor; the others are those of seed 2. Anew after that."""
    for tensor, array in enumerate(node.do(nodes.read, label)):
        expected = pattern(2, tensor, shape)
        for row, numbers in moved.items():
            expected[row] = numbers(tensor)
        np.testing.assert_array_equal(array, expected)
    node.do(nodes.fill, label, 2)


def _row(shape: tuple[int, int], row: int) -> Callable[[int], Any]:
    return lambda tensor: pattern(1, tensor, shape)[row]


@pytest.fixture
def full(start_node: Start) -> tuple[Node, Node]:
    """Two engines whose pools are full to the last page; caches of 1 have seed 1, of 2 seed 2."""
    pair = []
    for cluster in (1, 2):
        node = start_node(cluster, pool=POOL, enable_remote_cache_accessible=True)
        _fill_pool(node, BlocksCacheKey(cluster))
        for label in ("slots", "blocks"):
            node.do(nodes.fill, label, cluster)
        pair.append(node)
    nodes.link_pair(pair[0], pair[1])
    return pair[0], pair[1]


SLOT_SHAPE, BLOCK_SHAPE = (SLOTS, WIDTH), (BLOCKS, PER_BLOCK)
LAST = TENSORS // 2
"""Layers, of two tensors each."""


def test_pulls(full: tuple[Node, Node]) -> None:
    _, puller = full
    last = CacheKeyByIdAndIndex(1, 1, SLOTS - 1)
    for size in (-1, WIDTH * 4):
        puller.do(nodes.pull_cache, last, "slots", SLOTS - 1, size)
        _expect(puller, "slots", SLOT_SHAPE, {SLOTS - 1: _row(SLOT_SHAPE, SLOTS - 1)})
    assert "INVALID" in _refused(puller, nodes.pull_cache, last, "slots", 0, WIDTH * 4 + 1)
    for key, slot in ((last, SLOTS), (CacheKeyByIdAndIndex(1, 1, SLOTS), 0)):
        text = _refused(puller, nodes.pull_cache, key, "slots", slot)
        assert f"has {SLOTS} slots, 0 to {SLOTS - 1}" in text
    layers = range(LAST - 1, LAST)
    puller.do(nodes.pull_cache, last, "slots", 0, src_layer_range=layers, dst_layer_range=layers)
    beyond = range(LAST, LAST + 1)
    for ranges in ((layers, beyond), (beyond, layers)):
        given = dict(zip(("src_layer_range", "dst_layer_range"), ranges, strict=True))
        assert "INVALID" in _refused(puller, nodes.pull_cache, last, "slots", 0, **given)
    puller.do(nodes.fill, "slots", 2)

    for number in (1, BLOCKS):  # by plain Python, and by arrays
        blocks = list(range(BLOCKS - number, BLOCKS))
        for _ in range(2):
            puller.do(nodes.pull_blocks, BlocksCacheKey(1), "blocks", blocks, blocks)
            _expect(puller, "blocks", BLOCK_SHAPE, {b: _row(BLOCK_SHAPE, b) for b in blocks})
        more = [*blocks[1:], BLOCKS]
        for lists in ((blocks, more), (more, blocks)):
            text = _refused(puller, nodes.pull_blocks, BlocksCacheKey(1), "blocks", *lists)
            assert f"is {BLOCKS}: the cache has {BLOCKS} blocks" in text

    where = [BLOCKS - 1, 0, 5, 6]
    puller.do(nodes.pull_blocks, last, "blocks", [], where)  # a slot that four blocks hold exactly
    parts = {
        block: lambda tensor, at=at: _row(SLOT_SHAPE, SLOTS - 1)(tensor).reshape(4, -1)[at]
        for at, block in enumerate(where)
    }
    _expect(puller, "blocks", BLOCK_SHAPE, parts)
    assert "at most 4" in _refused(puller, nodes.pull_blocks, last, "blocks", [], [*where, 1])


def test_pushes(full: tuple[Node, Node]) -> None:
    pusher, target = full
    last = CacheKeyByIdAndIndex(2, 1, SLOTS - 1)
    pusher.do(nodes.push_cache, last, "slots", SLOTS - 1)
    _expect(target, "slots", SLOT_SHAPE, {SLOTS - 1: _row(SLOT_SHAPE, SLOTS - 1)})
    beyond = CacheKeyByIdAndIndex(2, 1, SLOTS)
    for key, slot in ((last, SLOTS), (beyond, 0)):
        text = _refused(pusher, nodes.push_cache, key, "slots", slot)
        assert f"has {SLOTS} slots, 0 to {SLOTS - 1}" in text
    for number in (1, BLOCKS):
        blocks = list(range(BLOCKS - number, BLOCKS))
        for _ in range(2):
            pusher.do(nodes.push_blocks, BlocksCacheKey(2), "blocks", blocks, blocks)
            _expect(target, "blocks", BLOCK_SHAPE, {b: _row(BLOCK_SHAPE, b) for b in blocks})
        more = [*blocks[1:], BLOCKS]
        for lists in ((blocks, more), (more, blocks)):
            text = _refused(pusher, nodes.push_blocks, BlocksCacheKey(2), "blocks", *lists)
            assert f"is {BLOCKS}: the cache has {BLOCKS} blocks" in text
    _expect(target, "blocks", BLOCK_SHAPE, {})


def _copy_slot(here: nodes.Here, *args: int) -> None:
    cache = here.caches["slots"]
    here.live.cache_manager.copy_cache(cache, cache, *args)


def _copy_block(here: nodes.Here, source: int, target: int) -> None:
    here.live.cache_manager.copy_blocks(here.caches["blocks"], {source: [target]})


def _copies(node: Node) -> None:
    size = WIDTH * 4
    node.do(_copy_slot, SLOTS - 1, 0, 0, size)
    own = {SLOTS - 1: lambda tensor: pattern(2, tensor, SLOT_SHAPE)[0]}
    _expect(node, "slots", SLOT_SHAPE, own)
    node.do(_copy_slot, 0, SLOTS - 1, size - 4, 4)
    node.do(_copy_slot, 0, SLOTS - 1, size - 4)
    node.do(nodes.fill, "slots", 2)
    wrong = ((SLOTS, 0), (0, SLOTS), (0, 1, size), (0, 1, size - 4, 5), (0, 1, 0, size + 1))
    for args in wrong:
        assert "INVALID" in _refused(node, _copy_slot, *args), args
    _expect(node, "slots", SLOT_SHAPE, {})
    node.do(_copy_block, 0, BLOCKS - 1)
    _expect(node, "blocks", BLOCK_SHAPE, {BLOCKS - 1: lambda t: pattern(2, t, BLOCK_SHAPE)[0]})
    for pair in ((0, BLOCKS), (BLOCKS, 0)):
        assert f"names block {BLOCKS}" in _refused(node, _copy_block, *pair)


def test_copies_and_pages_that_come_back(start_node: Start) -> None:
    node = start_node(2, pool=POOL)
    _fill_pool(node, BlocksCacheKey(2))
    for label in ("slots", "blocks"):
        node.do(nodes.fill, label, 2)
    _copies(node)
    for label in ("slots", "blocks"):
        node.do(nodes.deallocate, label)
    node.do(nodes.make, "whole", "cache", [1, POOL // 4], 1)
    node.do(nodes.deallocate, "whole")
    assert "LLM_OUT_OF_MEMORY" in _refused(node, nodes.make, "more", "cache", [1, POOL // 4 + 1], 1)
    _fill_pool(node, BlocksCacheKey(2))


def _register(here: nodes.Here, first: int, size: int) -> None:
    """A cache of one tensor over these bytes of some memory."""
    array = here.any.setdefault("memory", np.zeros(4 * PAGE, np.uint8))
    desc = CacheDesc(1, [1, size], DataType.DT_UINT8)
    here.live.cache_manager.register_cache(desc, [array.ctypes.data + first])


def test_registered_ranges_beside_and_inside_others(start_node: Start) -> None:
    node = start_node(1, pool=MIB)
    node.do(_register, PAGE, 2 * PAGE)
    inside = ((PAGE, PAGE), (2 * PAGE, PAGE), (2 * PAGE - 7, PAGE), (PAGE, 2 * PAGE))
    for first, size in inside:
        node.do(_register, first, size)
    for first, size in ((1, PAGE), (3 * PAGE - 1, PAGE), (PAGE - 1, 2 * PAGE + 2)):
        node.do(_register, first, size)
    for first, size in ((0, PAGE), (3 * PAGE, PAGE)):
        node.do(_register, first, size)

"""What a known way plans for a few blocks: as the full way does, or nothing (shortcuts.py)."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from datadist import BlocksCacheKey, CacheDesc, DataType
from datadist.transfers.shortcuts import FEW_BYTES, MOST, Few, Shortcuts, Way
from tests import nodes
from tests.nodes import Node, RemoteError

MINE, THEIRS = 1 << 40, 1 << 50
OURS, OWNERS = 10, 14
"""Blocks of our cache and of the owner's."""


def _way_parts(tensors: int, stride: int = 64) -> Any:
    def bases(first: int) -> tuple[int, ...]:
        return tuple(first + number * (1 << 30) for number in range(tensors))

    layout = SimpleNamespace(bases=bases(MINE), count=OURS, stride=stride)
    entry = SimpleNamespace(bases=list(bases(THEIRS)), count=OWNERS)
    attempt = SimpleNamespace(locks=[None], gone={})
    route = SimpleNamespace(view=SimpleNamespace(session=None), attempt=attempt, rank=0)
    transfers = SimpleNamespace(tallies=lambda _route, push: push, watches_control=True)
    cache = SimpleNamespace(layout=layout)
    return SimpleNamespace(cache=cache, entry=entry, route=route, transfers=transfers)


def _way(tensors: int, stride: int = 64) -> Way:
    parts = _way_parts(tensors, stride)
    return Way(parts.cache, parts.entry, parts.route, 0, parts.transfers)


def _pairs(few: Few) -> list[tuple[int, int, int]]:
    return sorted(zip(*few, strict=True))


def _expected(
    tensors: int, stride: int, source: list[int], target: list[int]
) -> list[tuple[int, int, int]]:
    return sorted(
        (MINE + number * (1 << 30) + b * stride, THEIRS + number * (1 << 30) + a * stride, stride)
        for number in range(tensors)
        for a, b in zip(source, target, strict=True)
    )


@pytest.mark.parametrize("tensors", [1, 2, 3])
@given(st.lists(st.tuples(st.integers(-2, OWNERS + 1), st.integers(-2, OURS + 1)), max_size=9))
@example([(OWNERS - 1, OURS - 1)])
@example([(OWNERS, 0)])
@example([(0, OURS)])
@example([(-1, 0)])
@example([(0, -1)])
@example([(0, 1), (OWNERS - 1, OURS - 1)])
@example([(0, 1), (OWNERS, 2)])
@example([(0, 1), (1, OURS)])
@example([(3, 1), (1, 3)])
@example([(1, 1), (1, 2)])
@example([(1, 2), (3, 2)])
def test_a_few_blocks_are_planned_where_both_caches_have_them(
    tensors: int, pairs: list[tuple[int, int]]
) -> None:
    source, target = [a for a, _ in pairs], [b for _, b in pairs]
    few = _way(tensors).plan_few(source, target)
    inside = all(0 <= a < OWNERS and 0 <= b < OURS for a, b in pairs)
    distinct = len(set(target)) == len(target)
    if inside and distinct and 0 < tensors * len(pairs) <= 8:
        assert few is not None
        assert _pairs(few) == _expected(tensors, 64, source, target)
    else:
        assert few is None


@pytest.mark.parametrize("tensors", [1, 2])
@pytest.mark.parametrize("odd", [True, 1.0, "1", None, np.int64(1)])
def test_what_is_no_plain_number_is_left_to_the_full_way(tensors: int, odd: Any) -> None:
    way = _way(tensors)
    for source, target in (([odd], [1]), ([1], [odd]), ([1, odd], [1, 2]), ([1, 2], [2, odd])):
        assert way.plan_few(source, target) is None
    assert way.plan_few([1], [1, 2]) is None
    assert way.plan_few([1, 2], [1]) is None


@pytest.mark.parametrize(("stride", "most"), [(64, 8), (FEW_BYTES // 2, 2), (FEW_BYTES, 1)])
def test_no_more_bytes_than_can_be_read_again(stride: int, most: int) -> None:
    way = _way(1, stride)
    blocks = [0, 1, 2, 3, 4, 5, 6, 8, 7]
    few = way.plan_few(blocks[:most], blocks[:most])
    assert few is not None
    assert _pairs(few) == _expected(1, stride, blocks[:most], blocks[:most])
    assert way.plan_few(blocks[: most + 1], blocks[: most + 1]) is None
    assert _way(1, FEW_BYTES + 1).plan_few([0], [0]) is None


def test_plans_do_not_share_their_vectors() -> None:
    way = _way(1)
    first, second = way.plan_few([3], [2]), way.plan_few([4], [1])
    assert _pairs(cast("Few", first)) == _expected(1, 64, [3], [2])
    assert _pairs(cast("Few", second)) == _expected(1, 64, [4], [1])


# -- which are kept ------------------------------------------------------------------------------


def _shortcuts(serves: bool) -> tuple[Shortcuts, Any]:
    parts = _way_parts(1)
    parts.transfers.serves = lambda _route: serves
    return Shortcuts(parts.transfers, cast("Any", None)), parts


def test_a_way_over_a_link_that_serves_no_more_is_not_kept() -> None:
    """A newer link to another engine came while the full way was gone."""
    for serves in (True, False):
        shortcuts, parts = _shortcuts(serves)
        shortcuts.remember((1, 0, 1), parts.cache, parts.entry, parts.route, 0)
        assert len(shortcuts._ways) == int(serves)


def test_so_many_ways_are_kept_and_no_more() -> None:
    shortcuts, parts = _shortcuts(True)
    for number in range(MOST):
        shortcuts.remember((number, 0, 1), parts.cache, parts.entry, parts.route, 0)
    assert len(shortcuts._ways) == MOST
    shortcuts.remember((MOST, 0, 1), parts.cache, parts.entry, parts.route, 0)
    assert list(shortcuts._ways) == [(MOST, 0, 1)]
    assert not shortcuts.pull((0, 0, 1), [0], [0])


# -- between engines ---------------------------------------------------------------------------


def _make(here: nodes.Here, label: str, blocks: int, key: BlocksCacheKey | None) -> None:
    desc = CacheDesc(1, [blocks, 16], DataType.DT_UINT8)
    cache = here.live.cache_manager.allocate_blocks_cache(desc, key)
    here.caches[label], here.arrays[label] = cache, cache.numpy()
    for block, row in enumerate(cache.numpy()[0]):
        row[:] = block + 1 if key else 0


def _first_bytes(here: nodes.Here, label: str) -> list[int]:
    return [int(row[0]) for row in here.arrays[label][0]]


def test_single_blocks_of_a_cache_with_one_tensor(start_node: Callable[..., Node]) -> None:
    owner, puller = start_node(1), start_node(2)
    owner.do(_make, "c", OWNERS, BlocksCacheKey(1))
    puller.do(_make, "c", OURS, None)
    nodes.link_pair(owner, puller)
    expected = [0] * OURS
    for source, target in ((0, 0), (OWNERS - 1, OURS - 1), (3, 1), (1, 3)):
        puller.do(nodes.pull_blocks, BlocksCacheKey(1), "c", [source], [target])
        expected[target] = source + 1
        assert puller.do(_first_bytes, "c") == expected
    wrong = [
        (OWNERS, 0, f"src_blocks[0] is {OWNERS}: the cache has {OWNERS} blocks"),
        (0, OURS, f"dst_blocks[0] is {OURS}: the cache has {OURS} blocks"),
        (OURS, OURS, f"dst_blocks[0] is {OURS}: the cache has {OURS} blocks"),
        (-1, 0, "src_blocks[0] is -1"),
        (0, -1, "dst_blocks[0] is -1"),
    ]
    for source, target, text in wrong:
        with pytest.raises(RemoteError) as caught:
            puller.do(nodes.pull_blocks, BlocksCacheKey(1), "c", [source], [target])
        assert text in caught.value.text
    assert puller.do(_first_bytes, "c") == expected

"""What a cached route plans for a few blocks: as the slow path does, or nothing (route_cache.py)."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from datadist import BlocksCacheKey, CacheDesc, DataType
from datadist.links.permits import Permits
from datadist.transfers.cached_route import SMALL_BYTES, CachedRoute, SmallPlan
from datadist.transfers.route_cache import MAX_ROUTES, RouteCache
from tests import nodes
from tests.nodes import Node, RemoteError

MINE, THEIRS = 1 << 40, 1 << 50
OURS, OWNERS = 10, 14
"""Blocks of our cache and of the owner's."""


def _cached_parts(tensors: int, stride: int = 64) -> Any:
    def bases(first: int) -> tuple[int, ...]:
        return tuple(first + number * (1 << 30) for number in range(tensors))

    layout = SimpleNamespace(
        bases=bases(MINE), count=OURS, stride=stride, block_bytes=stride, cuts=(),
        tensors_per_layer=2,
    )  # fmt: skip
    entry = SimpleNamespace(
        bases=list(bases(THEIRS)), count=OWNERS, stride=stride, cuts=[], tensors_per_layer=2
    )
    attempt = SimpleNamespace(permits=[Permits()], gone={}, dead=False, link=None)
    route = SimpleNamespace(view=SimpleNamespace(session=None), attempt=attempt, rank=0)
    transfers = SimpleNamespace(
        tallies=lambda _route, push: push, watches_control=lambda _route: True, timeout=1.0
    )
    cache, owned = SimpleNamespace(layout=layout), SimpleNamespace(caches={})
    return SimpleNamespace(cache=cache, owned=owned, entry=entry, route=route, transfers=transfers)


def _cached(tensors: int, stride: int = 64) -> CachedRoute:
    parts = _cached_parts(tensors, stride)
    return CachedRoute(parts.cache, parts.owned, parts.entry, parts.route, 0, parts.transfers)


def _pairs(max_small: SmallPlan) -> list[tuple[int, int, int]]:
    return sorted(zip(*max_small, strict=True))


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
    max_small = _cached(tensors).small_plan(source, target)
    inside = all(0 <= a < OWNERS and 0 <= b < OURS for a, b in pairs)
    distinct = len(set(target)) == len(target)
    if inside and distinct and 0 < tensors * len(pairs) <= 8:
        assert max_small is not None
        assert _pairs(max_small) == _expected(tensors, 64, source, target)
    else:
        assert max_small is None


def test_a_push_lists_no_target_twice_and_may_list_a_source_twice() -> None:
    cached = _cached(2)
    assert cached.small_plan([1, 1], [2, 3], True) is None
    twice = cached.small_plan([1, 2], [3, 3], True)
    assert twice is not None
    assert _pairs(twice) == _expected(2, 64, [1, 2], [3, 3])
    assert cached.small_plan([1, 2], [3, 3]) is None


@pytest.mark.parametrize("tensors", [1, 2])
@pytest.mark.parametrize("odd", [True, 1.0, "1", None, np.int64(1), [1]])
def test_what_is_no_plain_number_is_left_to_the_full_way(tensors: int, odd: Any) -> None:
    cached = _cached(tensors)
    for source, target in (([odd], [1]), ([1], [odd]), ([1, odd], [1, 2]), ([1, 2], [2, odd])):
        assert cached.small_plan(source, target) is None
    assert cached.small_plan([1], [1, 2]) is None
    assert cached.small_plan([1, 2], [1]) is None


@pytest.mark.parametrize(("stride", "most"), [(64, 8), (SMALL_BYTES // 2, 2), (SMALL_BYTES, 1)])
def test_no_more_bytes_than_can_be_read_again(stride: int, most: int) -> None:
    cached = _cached(1, stride)
    blocks = [0, 1, 2, 3, 4, 5, 6, 8, 7]
    max_small = cached.small_plan(blocks[:most], blocks[:most])
    assert max_small is not None
    assert _pairs(max_small) == _expected(1, stride, blocks[:most], blocks[:most])
    assert cached.small_plan(blocks[: most + 1], blocks[: most + 1]) is None
    assert _cached(1, SMALL_BYTES + 1).small_plan([0], [0]) is None


def _plan_while_a_list_changes(
    source: list[int], target: list[int], line: int, change: Callable[[], None]
) -> SmallPlan | None:
    """A plan in which another thread changes a list before the ``line``-th line runs."""
    lines = itertools.count()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and next(lines) == line:
            change()
        return trace if frame.f_code is CachedRoute.small_plan.__code__ else None

    cached, before = _cached(2), sys.gettrace()
    sys.settrace(trace)
    try:
        return cached.small_plan(source, target)
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("line", range(20))
@pytest.mark.parametrize("which", ["source", "target"])
def test_a_list_that_changes_meanwhile_is_planned_as_it_was_or_not_at_all(
    line: int, which: str
) -> None:
    for change in ("clear", "grow"):
        source, target = [0, 1, 2], [3, 4, 5]
        changed = source if which == "source" else target
        act = changed.clear if change == "clear" else partial(changed.extend, [6, 7, 8])
        max_small = _plan_while_a_list_changes(source, target, line, act)
        if max_small is not None:
            assert _pairs(max_small) == _expected(2, 64, [0, 1, 2], [3, 4, 5])


def test_plans_do_not_share_their_vectors() -> None:
    cached = _cached(1)
    first, second = cached.small_plan([3], [2]), cached.small_plan([4], [1])
    assert _pairs(cast("SmallPlan", first)) == _expected(1, 64, [3], [2])
    assert _pairs(cast("SmallPlan", second)) == _expected(1, 64, [4], [1])


# -- which are kept ------------------------------------------------------------------------------


def _route_cache(serves: bool) -> tuple[RouteCache, Any]:
    parts = _cached_parts(1)
    parts.transfers.serves = lambda _route: serves
    return RouteCache(parts.transfers, cast("Any", SimpleNamespace(caches={}))), parts


def test_a_way_over_a_link_that_serves_no_more_is_not_kept() -> None:
    """A newer link to another engine came while the slow path was gone."""
    for serves in (True, False):
        route_cache, parts = _route_cache(serves)
        route_cache.remember((1, 0, 1), parts.cache, parts.entry, parts.route, 0)
        assert len(route_cache._routes) == int(serves)


def test_so_many_ways_are_kept_and_no_more() -> None:
    route_cache, parts = _route_cache(True)
    for number in range(MAX_ROUTES):
        route_cache.remember((number, 0, 1), parts.cache, parts.entry, parts.route, 0)
    assert len(route_cache._routes) == MAX_ROUTES
    route_cache.remember((MAX_ROUTES, 0, 1), parts.cache, parts.entry, parts.route, 0)
    assert list(route_cache._routes) == [(MAX_ROUTES, 0, 1)]
    assert not route_cache.pull((0, 0, 1), [0], [0])


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

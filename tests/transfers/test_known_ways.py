"""Few blocks over a known route by the transport's own call: what core asks for, and counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest

from datadist import BlocksCacheKey, CacheDesc, DataType, LLMStatusCode
from datadist.transfers.cached_route import CachedRoute
from tests import core_ways, nodes
from tests.nodes import Node, RemoteError
from tests.quiet import until_quiet
from tests.waiting import until

Start = Callable[..., Node]
SHAPE, TENSORS = (8, 64), 4
BLOCK = SHAPE[1] * 4
KEY = BlocksCacheKey(1)
LISTS = ([1, 5], [6, 2])


@pytest.fixture
def linked(start_node: Start) -> tuple[Node, Node]:
    """An owner with a blocks cache, and an engine that knows the way to it for pulls and pushes."""
    owner, other = (start_node(n, enable_remote_cache_accessible=True) for n in (1, 2))
    owner.do(nodes.make, "c", "blocks", list(SHAPE), TENSORS, KEY)
    owner.do(nodes.fill, "c", 1)
    other.do(nodes.make, "c", "blocks", list(SHAPE), TENSORS)
    nodes.link_pair(owner, other)
    other.do(nodes.pull_blocks, KEY, "c", [0], [0])
    other.do(nodes.push_blocks, KEY, "c", [0], [0])
    return owner, other


def _routes(here: nodes.Here) -> list[CachedRoute]:
    """Of pulls, and of pushes."""
    return list(here.live._live(LLMStatusCode.LLM_FAILED).route_cache._routes.values())


def _move(here: nodes.Here, push: bool, times: int, **options: Any) -> None:
    move = nodes.push_blocks if push else nodes.pull_blocks
    for _ in range(times):
        move(here, KEY, "c", *LISTS, **options)


def _move_mostly_without_core(here: nodes.Here, push: bool, times: int, **options: Any) -> None:
    """Core reads and writes itself only while messages of the owner are on their way."""
    link: Any = _routes(here)[0].attempt.link
    with (
        mock.patch.object(link, "read", wraps=link.read) as read,
        mock.patch.object(link, "write", wraps=link.write) as write,
    ):
        _move(here, push, times, **options)
    if "notify" not in options:  # which the owner answers
        assert read.call_count + write.call_count < times // 2


def _counts(here: nodes.Here, push: bool) -> tuple[int, int, int]:
    found = here.live.stats()["links"][0]["push" if push else "pull"]
    return found["operations"], found["bytes"], found["errors"]


@pytest.mark.parametrize("options", [{}, {"timeout_in_millis": 5000}, {"notify": b"done"}])
@pytest.mark.parametrize("push", [False, True])
def test_what_it_moves_is_what_core_moves_and_is_counted_alike(
    linked: tuple[Node, Node], push: bool, options: dict[str, Any]
) -> None:
    owner, other = linked
    until_quiet(owner, other)
    other.do(nodes.fill, "c", 2)
    contents, counts = [], [other.do(_counts, push)]
    for move, times in ((_move_mostly_without_core, 50), (_move, 1)):
        (owner if push else other).do(nodes.fill, "c", 3)
        other.do(move, push, times, **options)
        contents.append((owner if push else other).do(nodes.read, "c"))
        counts.append(other.do(_counts, push))
        other.do(core_ways.take)
    for first, second in zip(*contents, strict=True):
        np.testing.assert_array_equal(first, second)
    nbytes = 2 * TENSORS * BLOCK
    (a, b, c), (d, e, f), (g, h, i) = counts
    assert (d - a, e - b, f - c) == (50, 50 * nbytes, 0)
    assert (g - d, h - e, i - f) == (1, nbytes, 0)


def _moves_beside(here: nodes.Here, push: bool, name: str) -> bool:
    """Whether the call moves beside a change, which it did before."""
    cached = _routes(here)[push]
    owned = here.live._live(LLMStatusCode.LLM_FAILED).route_cache._caches
    changes: dict[str, Any] = {
        "version": mock.patch.object(cached.view, "version", cached.version + 1),
        "handling": mock.patch.object(cached.session, "dispatching", True),
        "closed": mock.patch.object(cached.session, "closed", True),
        "freed": mock.patch.object(cached.cache, "held", False),
        "dropped": mock.patch.object(cached.attempt, "dead", True),
        "another link": mock.patch.object(cached.attempt, "link", object()),
        "gone": mock.patch.dict(cached.gone, {cached.rank: "for the test"}),
        "forgotten": mock.patch.dict(owned, clear=True),
    }
    call = cached.known
    assert call is not None
    until(lambda: call(*LISTS, 5.0) is not None, nodes.SECONDS)
    with changes[name]:
        return call(*LISTS, 5.0) is not None


@pytest.mark.parametrize("push", [False, True])
@pytest.mark.parametrize(
    "name",
    ["version", "handling", "closed", "freed", "dropped", "another link", "gone", "forgotten"],
)
def test_it_moves_nothing_where_the_route_is_not_as_it_was(
    linked: tuple[Node, Node], name: str, push: bool
) -> None:
    assert not linked[1].do(_moves_beside, push, name)


def _end(here: nodes.Here, comm_id: int) -> list[float | None]:
    known = [cached.known for cached in _routes(here)]
    here.live.unlink(comm_id)
    return [None if call is None else call(*LISTS, 5.0) for call in known]


def test_it_ends_with_the_link(start_node: Start) -> None:
    owner, other = (start_node(n, enable_remote_cache_accessible=True) for n in (1, 2))
    owner.do(nodes.make, "c", "blocks", list(SHAPE), TENSORS, KEY)
    other.do(nodes.make, "c", "blocks", list(SHAPE), TENSORS)
    _, comm_id = nodes.link_pair(owner, other)
    other.do(nodes.pull_blocks, KEY, "c", [0], [0])
    other.do(nodes.push_blocks, KEY, "c", [0], [0])
    assert other.do(_end, comm_id) == [None, None]


def _register(here: nodes.Here, label: str, key: BlocksCacheKey | None) -> None:
    memory = here.any[label] = np.ones((4, 256), np.uint8)
    here.caches[label] = here.live.cache_manager.register_blocks_cache(
        CacheDesc(1, list(memory.shape), DataType.DT_UINT8), [memory.ctypes.data], key
    )


def _moves_after(here: nodes.Here, push: bool, seconds: float) -> int:
    """Reads or writes by core's way of a transfer whose own call says that it took so long."""
    (cached,) = _routes(here)
    link: Any = cached.attempt.link
    name = "write" if push else "read"
    with (
        mock.patch.object(link, name, wraps=getattr(link, name)) as moved,
        mock.patch.object(cached, "known", return_value=seconds),
    ):
        if push:
            nodes.push_blocks(here, KEY, "c", [1], [2], tensor_num_per_layer=1)
        else:
            nodes.pull_blocks(here, KEY, "c", [1], [2])
    return int(moved.call_count)


@pytest.mark.parametrize("pooled", [True, False])
def test_registered_memory_is_read_again_after_a_call_that_took_long(
    start_node: Start, pooled: bool
) -> None:
    """Its owner may have told meanwhile that it is used for something else."""
    owner, puller = start_node(1), start_node(2)
    if pooled:
        owner.do(nodes.make, "c", "blocks", list(SHAPE), 1, KEY)
        puller.do(nodes.make, "c", "blocks", list(SHAPE), 1)
    else:
        owner.do(_register, "c", KEY)
        puller.do(_register, "c", None)
    nodes.link_pair(owner, puller)
    puller.do(nodes.pull_blocks, KEY, "c", [1], [2])
    assert puller.do(_moves_after, False, 0.1) == 0
    assert (puller.do(_moves_after, False, 0.6) > 0) is not pooled


def _raise(here: nodes.Here, push: bool) -> None:
    """A transfer whose own call raises what the interface does not allow."""
    error = ZeroDivisionError("made by the test")
    with mock.patch.object(_routes(here)[push], "known", side_effect=error):
        _move(here, push, 1)


@pytest.mark.parametrize("push", [False, True])
def test_what_a_call_raises_is_reported_as_a_defect_of_the_transport(
    linked: tuple[Node, Node], push: bool
) -> None:
    other = linked[1]
    operations, nbytes, errors = other.do(_counts, push)
    with pytest.raises(RemoteError, match="ZeroDivisionError") as caught:
        other.do(_raise, push)
    assert (caught.value.kind, caught.value.status) == ("LLMException", "LLM_FAILED")
    assert other.do(_counts, push) == (operations, nbytes, errors + 1)
    other.do(_move, push, 1)


def _find_route(here: nodes.Here, push: bool) -> list[bool]:
    """Whether there is a call for a route that is looked up while the link raises for that."""
    link: Any = _routes(here)[push].attempt.link
    here.live._live(LLMStatusCode.LLM_FAILED).route_cache.clear()
    with mock.patch.object(link, "known_way", side_effect=ZeroDivisionError("made by the test")):
        _move(here, push, 2)
    return [cached.known is not None for cached in _routes(here)]


@pytest.mark.parametrize("push", [False, True])
def test_a_link_that_raises_where_it_is_asked_for_a_call_has_none(
    linked: tuple[Node, Node], push: bool
) -> None:
    other = linked[1]
    assert other.do(_find_route, push) == [False]
    assert any("known_way" in line for line in other.do(nodes.log_of, "ERROR"))


def _register_accessible(here: nodes.Here, key: BlocksCacheKey | None) -> None:
    memory = here.any["c"] = np.ones((4, 256), np.uint8)
    here.caches["c"] = here.live.cache_manager.register_blocks_cache(
        CacheDesc(1, list(memory.shape), DataType.DT_UINT8),
        [memory.ctypes.data],
        key,
        remote_accessible=True,
    )


def test_a_push_that_took_long_is_not_written_again(start_node: Start) -> None:
    """Its memory was the owner's cache when it was written."""
    owner, pusher = (start_node(n, enable_remote_cache_accessible=True) for n in (1, 2))
    owner.do(_register_accessible, KEY)
    pusher.do(_register_accessible, None)
    nodes.link_pair(owner, pusher)
    pusher.do(nodes.push_blocks, KEY, "c", [1], [2], tensor_num_per_layer=1)
    assert pusher.do(_moves_after, True, 0.6) == 0

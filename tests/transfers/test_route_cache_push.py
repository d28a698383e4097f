"""Pushes that go the way of an earlier one, and what must make them take the slow path again."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest

from datadist import BlocksCacheKey, CacheDesc, DataType, LLMStatusCode
from datadist.transfers.route_cache import RouteCache
from tests import nodes
from tests.block_lists import LISTS
from tests.nodes import Node, RemoteError

BLOCKS, BYTES, TENSORS = 64, 256, 4


def _make(here: nodes.Here, label: str, keyed: bool) -> None:
    """Ours is filled with what differs from block to block, the target (``keyed``) with zeros."""
    desc = CacheDesc(TENSORS, [BLOCKS, BYTES], DataType.DT_UINT8)
    key = BlocksCacheKey(1) if keyed else None
    cache = here.live.cache_manager.allocate_blocks_cache(desc, key)
    here.caches[label] = cache
    for number, tensor in enumerate(cache.numpy()):
        for block in range(BLOCKS):
            tensor[block] = 0 if keyed else number * BLOCKS + block


def _push(here: nodes.Here, source: Any, target: Any, **more: Any) -> None:
    cache = here.caches["ours"]
    here.live.cache_manager.push_blocks(BlocksCacheKey(1), cache, source, target, **more)


def _arrived(here: nodes.Here, label: str) -> list[list[int]]:
    """The first byte of each block, and zeros from now on."""
    found = [[int(block[0]) for block in tensor] for tensor in here.caches[label].numpy()]
    for tensor in here.caches[label].numpy():
        tensor[:] = 0
    return found


def _expected(source: Any, target: Any) -> list[list[int]]:
    expected = [[0] * BLOCKS for _ in range(TENSORS)]
    for number, tensor in enumerate(expected):
        for a, b in zip(source, target, strict=True):
            tensor[int(b)] = number * BLOCKS + int(a)
    return expected


def _known(here: nodes.Here) -> int:
    return len(here.live._live(LLMStatusCode.LLM_FAILED).route_cache._routes)


@pytest.fixture
def linked(start_node: Callable[..., Node]) -> tuple[Node, Node]:
    """The owner of a blocks cache and one that pushes into it."""
    target, pusher = (start_node(c, enable_remote_cache_accessible=True) for c in (1, 2))
    target.do(_make, "theirs", True)
    pusher.do(_make, "ours", False)
    nodes.link_pair(target, pusher, "pushes")
    return target, pusher


@pytest.mark.parametrize(("source", "target"), LISTS)
def test_a_second_push_moves_the_same_as_the_first(
    linked: tuple[Node, Node], source: Any, target: Any
) -> None:
    owner, pusher = linked
    for _ in range(3):
        pusher.do(_push, source, target)
        assert owner.do(_arrived, "theirs") == _expected(source, target)
    assert pusher.do(_known) == 1


@pytest.mark.parametrize(
    ("source", "target", "more", "text"),
    [
        ([64], [0], {}, r"src_blocks\[0\] is 64"),
        ([0], [64], {}, r"dst_blocks\[0\] is 64"),
        ([0], [-1], {}, r"dst_blocks\[0\] is -1"),
        ([0, 1], [0], {}, "2 entries"),
        ([0], [], {}, "dst_blocks is empty"),
        ([0.5], [0], {}, "float"),
        (np.zeros((2, 2), np.int64), [0, 1], {}, "one dimension"),
        ([0], [0], {"tensor_num_per_layer": 3}, "multiple of tensor_num_per_layer"),
        ([0], [0], {"tensor_num_per_layer": 2.0}, "tensor_num_per_layer is a float"),
        ([0], [0], {"src_layer_range": range(0, 1)}, "differ in length"),
    ],
)
def test_errors_are_the_same_after_a_good_push(
    linked: tuple[Node, Node], source: Any, target: Any, more: dict[str, Any], text: str
) -> None:
    owner, pusher = linked
    for _ in range(2):
        with pytest.raises(RemoteError, match=text):
            pusher.do(_push, source, target, **more)
        assert owner.do(_arrived, "theirs") == _expected([], [])
        pusher.do(_push, [5], [6])
        assert owner.do(_arrived, "theirs") == _expected([5], [6])


def test_a_part_of_the_layers_is_not_taken_for_all(linked: tuple[Node, Node]) -> None:
    owner, pusher = linked
    layers: dict[str, Any] = {"src_layer_range": range(0, 1), "dst_layer_range": range(1, 2)}
    for _ in range(2):
        pusher.do(_push, [5], [6], **layers)
        tensors = owner.do(_arrived, "theirs")
        assert [tensor[6] for tensor in tensors] == [0, 0, 5, BLOCKS + 5]
    assert pusher.do(_known) == 0


def test_a_key_that_moved_to_another_cache_is_followed(linked: tuple[Node, Node]) -> None:
    owner, pusher = linked
    pusher.do(_push, [5], [6])
    owner.do(_free, "theirs")
    owner.do(_make, "other", False)
    owner.do(_make, "theirs", True)
    for _ in range(2):
        pusher.do(_push, [5], [6])
        assert owner.do(_arrived, "theirs") == _expected([5], [6])


def _free(here: nodes.Here, label: str) -> None:
    here.live.cache_manager.deallocate_blocks_cache(here.caches.pop(label))


def test_what_is_gone_is_not_written(linked: tuple[Node, Node]) -> None:
    owner, pusher = linked
    pusher.do(_push, [5], [6])
    owner.do(_free, "theirs")
    with pytest.raises(RemoteError) as caught:
        pusher.do(_push, [5], [6])
    assert caught.value.status == "LLM_KV_CACHE_NOT_EXIST"
    owner.do(_make, "theirs", True)
    pusher.do(_push, [5], [6])
    owner.kill()
    with pytest.raises(RemoteError) as caught:
        pusher.do(_push, [5], [6])
    assert caught.value.status in ("LLM_FAILED", "LLM_NOT_YET_LINK")


def test_nothing_is_written_by_a_forked_child(linked: tuple[Node, Node]) -> None:
    owner, pusher = linked
    pusher.do(_push, [5], [6])
    owner.do(_arrived, "theirs")
    assert pusher.do(_push_in_child) == 0
    assert owner.do(_arrived, "theirs") == _expected([], [])


def _push_in_child(here: nodes.Here) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            _push(here, [5], [6])
        except Exception as error:
            os._exit(0 if "forked" in str(error) else 2)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize(
    ("source", "target", "kind", "text"),
    [
        ([1, 2], [3, 3], "LLMException", r"dst_blocks\[1\] is 3, and so is dst_blocks\[0\]"),
        (np.arange(40), np.arange(40) // 2, "LLMException", r"dst_blocks\[1\] is 0, and so is"),
        (list(range(40)), [*range(39), 7], "LLMException", r"dst_blocks\[39\] is 7, and so is .*7"),
        ([True], [0], "TypeError", r"src_blocks\[0\] is a bool"),
        ([2, 3], [True, 5], "TypeError", r"dst_blocks\[0\] is a bool"),
        (list(range(20)), [*range(2, 21), False], "TypeError", r"dst_blocks\[19\] is a bool"),
    ],
)
def test_lists_that_are_in_no_order_are_refused_after_a_good_push(
    linked: tuple[Node, Node], source: Any, target: Any, kind: str, text: str
) -> None:
    owner, pusher = linked
    for _ in range(2):
        with pytest.raises(RemoteError, match=text) as caught:
            pusher.do(_push, source, target)
        assert caught.value.kind == kind
        assert owner.do(_arrived, "theirs") == _expected([], [])
        pusher.do(_push, [5], [6])
        assert owner.do(_arrived, "theirs") == _expected([5], [6])


def test_a_source_may_go_to_several_blocks(linked: tuple[Node, Node]) -> None:
    owner, pusher = linked
    for _ in range(2):
        pusher.do(_push, [5, 5, 7], [1, 2, 3])
        assert owner.do(_arrived, "theirs") == _expected([5, 5, 7], [1, 2, 3])


def _push_without_the_general_move(here: nodes.Here, source: Any, target: Any) -> None:
    with mock.patch.object(RouteCache, "_move", side_effect=AssertionError("not the short way")):
        _push(here, source, target)


def test_a_few_blocks_take_the_short_way(linked: tuple[Node, Node]) -> None:
    owner, pusher = linked
    pusher.do(_push, [5], [6])
    owner.do(_arrived, "theirs")
    before = pusher.do(_operations)
    for source, target in (([5], [6]), ([7, 8], [9, 1])):
        pusher.do(_push_without_the_general_move, source, target)
        assert owner.do(_arrived, "theirs") == _expected(source, target)
    assert pusher.do(_operations) == before + 2


def _operations(here: nodes.Here) -> int:
    return int(here.live.stats()["total"]["push"]["operations"])


class _Alarm(KeyboardInterrupt):
    """What a handler of a signal raises."""


def _interrupt_pushes(here: nodes.Here, rounds: int) -> None:
    """Interrupt small pushes, wherever they are."""
    armed, random_moment = False, random.Random(1).uniform

    def handle(_number: int, _frame: object) -> None:
        if armed:
            raise _Alarm

    before = signal.signal(signal.SIGALRM, handle)
    for _ in range(rounds):
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, random_moment(20e-6, 150e-6))
            while True:
                _push(here, [5], [6])
        except _Alarm:
            armed = False
        _push(here, [5], [6])
    signal.signal(signal.SIGALRM, before)


def _in_use(here: nodes.Here) -> tuple[int, int, int]:
    """Transfers that keep our cache, those that a peer waits for, and permits that are taken."""
    engine = here.live._live(LLMStatusCode.LLM_FAILED)
    pins = engine.owned._caches[here.caches["ours"].cache_id].pins
    (cached,) = engine.route_cache._routes.values()
    pulls = sum(len(view.pulls) for view in engine.views.values())
    return len(pins), pulls, cached.permits.taken


def test_small_pushes_that_are_interrupted_leave_nothing_taken(linked: tuple[Node, Node]) -> None:
    owner, pusher = linked
    pusher.do(_push, [5], [6])
    pusher.do(_interrupt_pushes, 1000)
    assert pusher.do(_in_use) == (0, 0, 0)
    assert owner.do(_arrived, "theirs") == _expected([5], [6])


def _break(here: nodes.Here) -> None:
    (cached,) = here.live._live(LLMStatusCode.LLM_FAILED).route_cache._routes.values()
    cached.attempt.gone[cached.rank] = "for the test"


def test_a_link_that_is_broken_is_not_written_to(linked: tuple[Node, Node]) -> None:
    owner, pusher = linked
    pusher.do(_push, [5], [6])
    owner.do(_arrived, "theirs")
    pusher.do(_break)
    with pytest.raises(RemoteError) as caught:
        pusher.do(_push, [5], [6])
    assert caught.value.status == "LLM_NOT_YET_LINK"
    assert owner.do(_arrived, "theirs") == _expected([], [])

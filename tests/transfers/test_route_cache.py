"""Pulls that go the way of an earlier one, and what must make them take the slow path again."""

from __future__ import annotations

import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from datadist import BlocksCacheKey, CacheDesc, DataType, LLMException, LLMStatusCode
from tests import core_ways, nodes
from tests.block_lists import LISTS
from tests.nodes import Node, RemoteError
from tests.quiet import until_quiet
from tests.waiting import until

Start = Callable[..., Node]
BLOCKS, BYTES, TENSORS = 64, 256, 3


def _desc() -> CacheDesc:
    return CacheDesc(TENSORS, [BLOCKS, BYTES], DataType.DT_UINT8)


def _make(here: nodes.Here, label: str, keyed: bool, value: int) -> None:
    key = BlocksCacheKey(1) if keyed else None
    cache = here.live.cache_manager.allocate_blocks_cache(_desc(), key)
    here.caches[label] = cache
    for number, tensor in enumerate(cache.numpy()):
        for block in range(BLOCKS):
            tensor[block] = (value + number * BLOCKS + block) % 251 if value else 0


def _pull(here: nodes.Here, source: Any, target: Any) -> list[list[int]]:
    cache = here.caches["target"]
    for tensor in cache.numpy():
        tensor[:] = 0
    here.live.cache_manager.pull_blocks(BlocksCacheKey(1), cache, source, target)
    return [[int(tensor[block][0]) for block in target] for tensor in cache.numpy()]


def _expected(value: int, source: Any) -> list[list[int]]:
    return [
        [(value + number * BLOCKS + int(block)) % 251 for block in source]
        for number in range(TENSORS)
    ]


def _known(here: nodes.Here) -> int:
    return len(here.live._live(LLMStatusCode.LLM_FAILED).route_cache._routes)


def _cached(here: nodes.Here) -> Any:
    (cached,) = here.live._live(LLMStatusCode.LLM_FAILED).route_cache._routes.values()
    return cached


def _free(here: nodes.Here, label: str) -> None:
    here.live.cache_manager.deallocate_blocks_cache(here.caches.pop(label))


@pytest.fixture
def linked(start_node: Start) -> tuple[Node, Node]:
    """An owner with a blocks cache and a puller, linked."""
    owner, puller = start_node(1), start_node(2)
    owner.do(_make, "source", True, 100)
    puller.do(_make, "target", False, 0)
    nodes.link_pair(owner, puller, "route_cache")
    return owner, puller


@pytest.mark.parametrize(("source", "target"), LISTS)
def test_a_second_pull_moves_the_same_as_the_first(
    linked: tuple[Node, Node], source: Any, target: Any
) -> None:
    _, puller = linked
    for _ in range(3):
        assert puller.do(_pull, source, target) == _expected(100, source)
    assert puller.do(_known) == 1


@pytest.mark.parametrize(
    ("source", "target", "kind", "text"),
    [
        ([64], [0], "LLMException", r"src_blocks\[0\] is 64"),
        ([0], [-1], "TypeError", r"dst_blocks\[0\] is -1"),
        ([0, 1], [0], "LLMException", "2 entries"),
        ([0], [], "LLMException", "dst_blocks is empty"),
        ([], [0], "LLMException", "src_blocks is empty"),
        ([0.5], [0], "TypeError", "float"),
        ([np.float32(1)], [0], "TypeError", r"src_blocks\[0\] is a float32"),
        ([np.zeros(1, np.int64)] * 9, list(range(9)), "TypeError", "is a ndarray"),
        ([True], [0], "TypeError", r"src_blocks\[0\] is a bool"),
        ([1], [False], "TypeError", r"dst_blocks\[0\] is a bool"),
        ([*range(2, 22), True], list(range(21)), "TypeError", r"src_blocks\[20\] is a bool"),
        ([5, 6], [True, 2], "TypeError", r"dst_blocks\[0\] is a bool"),
        (np.ones(2, bool), [0, 1], "TypeError", "array of bool"),
        ([1, 2], [3, 3], "LLMException", r"dst_blocks\[1\] is 3, and so is dst_blocks\[0\]"),
        ((1, 2), (3, 3), "LLMException", r"dst_blocks\[1\] is 3, and so is"),
        (np.array([1, 2]), np.array([3, 3]), "LLMException", r"dst_blocks\[1\] is 3, and so is"),
        (list(range(40)), [*range(39), 7], "LLMException", r"dst_blocks\[39\] is 7, and so is .*7"),
        (np.arange(40), np.arange(40) // 2, "LLMException", r"dst_blocks\[1\] is 0, and so is"),
        (None, [0], "TypeError", "src_blocks"),
        ([0], "0", "TypeError", "dst_blocks"),
        (np.zeros((2, 2), np.int64), [0, 1], "TypeError", "one dimension"),
        (np.zeros(2), [0, 1], "TypeError", "float64"),
        (np.array([64]), np.array([0]), "LLMException", r"src_blocks\[0\] is 64"),
    ],
)
def test_errors_are_the_same_after_a_good_pull(
    linked: tuple[Node, Node], source: Any, target: Any, kind: str, text: str
) -> None:
    _, puller = linked
    for _ in range(2):
        with pytest.raises(RemoteError, match=text) as caught:
            puller.do(_pull_only, source, target)
        assert caught.value.kind == kind
        assert puller.do(_pull, [5], [6]) == _expected(100, [5])


def _pull_only(here: nodes.Here, source: Any, target: Any) -> None:
    here.live.cache_manager.pull_blocks(BlocksCacheKey(1), here.caches["target"], source, target)


def test_a_key_that_moved_to_another_cache_is_followed(linked: tuple[Node, Node]) -> None:
    owner, puller = linked
    assert puller.do(_pull, [5], [6]) == _expected(100, [5])
    owner.do(_free, "source")
    owner.do(_make, "other", False, 1)
    owner.do(_make, "source", True, 50)
    assert puller.do(_pull, [5], [6]) == _expected(50, [5])
    assert puller.do(_pull, [5], [6]) == _expected(50, [5])


def test_a_cache_that_was_freed_cannot_be_pulled(linked: tuple[Node, Node]) -> None:
    owner, puller = linked
    puller.do(_pull, [5], [6])
    owner.do(_free, "source")
    with pytest.raises(RemoteError) as caught:
        puller.do(_pull, [5], [6])
    assert caught.value.status == "LLM_KV_CACHE_NOT_EXIST"


def test_a_target_that_was_freed_cannot_be_pulled_into(linked: tuple[Node, Node]) -> None:
    _, puller = linked
    puller.do(_pull, [5], [6])
    with pytest.raises(RemoteError) as caught:
        puller.do(_pull_into_freed)
    assert caught.value.status == "LLM_KV_CACHE_NOT_EXIST"


def _pull_into_freed(here: nodes.Here) -> None:
    manager, cache = here.live.cache_manager, here.caches["target"]
    manager.deallocate_blocks_cache(cache)
    manager.pull_blocks(BlocksCacheKey(1), cache, [5], [6])


def test_after_unlink_the_link_is_missed_and_a_new_one_found(linked: tuple[Node, Node]) -> None:
    owner, puller = linked
    puller.do(_pull, [5], [6])
    assert puller.do(_routes) == 1
    for node in (owner, puller):
        node.do(_unlink_all)
    until(lambda: puller.do(_routes) == 0)
    with pytest.raises(RemoteError) as caught:
        puller.do(_pull, [5], [6])
    assert caught.value.status == "LLM_NOT_YET_LINK"
    nodes.link_pair(owner, puller, "again")
    assert puller.do(_pull, [5], [6]) == _expected(100, [5])


def _routes(here: nodes.Here) -> int:
    return len(here.live._live(LLMStatusCode.LLM_FAILED).route_cache._routes)


def _unlink_all(here: nodes.Here) -> None:
    for comm_id in list(here.live._live(LLMStatusCode.LLM_FAILED)._links.domains):
        here.live.unlink(comm_id)


def test_an_owner_that_died_is_reported(linked: tuple[Node, Node]) -> None:
    owner, puller = linked
    puller.do(_pull, [5], [6])
    owner.kill()
    with pytest.raises(RemoteError) as caught:
        puller.do(_pull, [5], [6])
    assert caught.value.status in ("LLM_FAILED", "LLM_NOT_YET_LINK")


def test_a_small_pull_does_not_wait_for_a_thread_that_computes(linked: tuple[Node, Node]) -> None:
    """Whoever lets the GIL go gets it back from a computing thread after 5 ms."""
    owner, puller = linked
    puller.do(_pull, [5], [6])
    until_quiet(owner, puller)
    assert puller.do(_switches_during_pulls) == 0


def _switches_during_pulls(here: nodes.Here) -> int:
    """How often another thread, which waits for the GIL all the time, got it during 50 pulls."""
    turns, stop = 0, False

    def take_turns() -> None:
        nonlocal turns
        while not stop:
            turns += 1
            time.sleep(0)  # lets the GIL go, and waits for it

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=take_turns)
    thread.start()
    sys.setswitchinterval(1000)  # nobody is made to let it go
    try:
        time.sleep(0.01)
        began, before = time.monotonic(), turns
        while time.monotonic() < began + 0.01:  # for the thread to arrive where it waits
            before = turns
        for _ in range(50):
            _pull_only(here, [5], [6])
        return turns - before
    finally:
        stop = True
        sys.setswitchinterval(interval)
        thread.join()


def test_a_peer_that_keeps_talking_makes_pulls_slow_but_not_wrong(
    linked: tuple[Node, Node],
) -> None:
    owner, puller = linked
    puller.do(_pull, [5], [6])
    owner.begin(_make_and_free, 200)
    for _ in range(50):
        assert puller.do(_pull, [5], [6]) == _expected(100, [5])
    owner.result()
    before = puller.do(_operations)
    assert puller.do(_pull, [5], [6]) == _expected(100, [5])
    assert puller.do(_operations) == before + 1


def _make_and_free(here: nodes.Here, times: int) -> None:
    for _ in range(times):
        _make(here, "passing", False, 0)
        _free(here, "passing")


def _operations(here: nodes.Here) -> int:
    return int(here.live.stats()["total"]["pull"]["operations"])


def test_what_arrives_during_a_small_pull_is_heard_before_it_returns(
    linked: tuple[Node, Node],
) -> None:
    owner, puller = linked
    puller.do(_pull, [5], [6])
    for value in (50, 60, 70):  # each time the puller has not looked since the key moved
        owner.do(_free, "source")
        owner.do(_make, "source", True, value)
        assert puller.do(_pull, [5], [6]) == _expected(value, [5])
    owner.do(_free, "source")
    with pytest.raises(RemoteError) as caught:
        puller.do(_pull, [5], [6])
    assert caught.value.status == "LLM_KV_CACHE_NOT_EXIST"
    assert puller.do(_known) == 0


class _Alarm(KeyboardInterrupt):
    """What a handler of a signal raises."""


def _interrupt_pulls(here: nodes.Here, rounds: int) -> list[str]:
    """Interrupt small pulls, wherever they are; what a pull after each interruption says."""
    armed, found, random_moment = False, [], random.Random(1).uniform

    def handle(_number: int, _frame: object) -> None:
        if armed:
            raise _Alarm

    before = signal.signal(signal.SIGALRM, handle)
    for _ in range(rounds):
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, random_moment(20e-6, 150e-6))
            while True:
                _pull_only(here, [5], [6])
        except _Alarm:
            armed = False
        try:
            _pull_only(here, [5], [6])
        except LLMException as error:
            found.append(str(error))
            break
    signal.signal(signal.SIGALRM, before)
    return found


def _in_use(here: nodes.Here) -> tuple[int, int]:
    """Local transfers that keep our cache, and pulls that a peer waits for."""
    engine = here.live._live(LLMStatusCode.LLM_FAILED)
    pins = engine.owned._caches[here.caches["target"].cache_id].pins
    return len(pins), sum(len(view.pulls) for view in engine.views.values())


def test_small_pulls_that_are_interrupted_leave_nothing_taken(linked: tuple[Node, Node]) -> None:
    _, puller = linked
    puller.do(_pull, [5], [6])
    puller.do(_pull, [5], [6])
    assert puller.do(_interrupt_pulls, 2000) == []
    assert puller.do(_in_use) == (0, 0)
    assert puller.do(_pull, [5], [6]) == _expected(100, [5])


def _reads_of_a_pull(here: nodes.Here, seconds: float) -> tuple[int, str]:
    """Reads of the transport in one pull, and its outcome; each takes so much longer."""
    core_ways.take(here)
    link, reads = _cached(here).attempt.link, 0
    read = link.read

    def slow(*args: Any) -> Any:
        nonlocal reads
        reads += 1
        time.sleep(seconds)
        return read(*args)

    link.read = slow
    try:
        _pull_only(here, [1], [2])
    except LLMException as error:
        return reads, error.status_code.name
    finally:
        del link.read
    return reads, "OK"


def test_a_link_that_is_broken_is_not_read_from(linked: tuple[Node, Node]) -> None:
    _, puller = linked
    puller.do(_pull, [5], [6])
    puller.do(_break)
    assert puller.do(_reads_of_a_pull, 0.0) == (0, "LLM_NOT_YET_LINK")


def _break(here: nodes.Here) -> None:
    cached = _cached(here)
    cached.attempt.gone[cached.rank] = "for the test"


def _register_large(here: nodes.Here, label: str, keyed: bool) -> None:
    memory = here.any["memory"] = np.ones((4, 300 << 10), np.uint8)
    here.caches[label] = here.live.cache_manager.register_blocks_cache(
        CacheDesc(1, list(memory.shape), DataType.DT_UINT8),
        [memory.ctypes.data],
        BlocksCacheKey(1) if keyed else None,
    )


def test_what_takes_long_is_not_read_twice(start_node: Start) -> None:
    """The owner of registered memory is asked after a long read, which is as good as before then."""
    owner, puller = start_node(1), start_node(2)
    owner.do(_register_large, "source", True)
    puller.do(_register_large, "target", False)
    nodes.link_pair(owner, puller, "large")
    puller.do(_pull_only, [1], [2])
    until_quiet(owner, puller)
    assert puller.do(_reads_of_a_pull, 0.6) == (1, "OK")


def _register_small(here: nodes.Here, label: str, keyed: bool) -> None:
    memory = here.any[label] = np.ones((4, BYTES), np.uint8)
    here.caches[label] = here.live.cache_manager.register_blocks_cache(
        CacheDesc(1, list(memory.shape), DataType.DT_UINT8),
        [memory.ctypes.data],
        BlocksCacheKey(1) if keyed else None,
    )


@pytest.mark.parametrize(("make", "reads"), [(_make, 1), (_register_small, 2)])
def test_a_few_blocks_that_took_long(
    start_node: Start, make: Callable[..., None], reads: int
) -> None:
    """Of registered memory they are read again, in the way that asks the owner afterwards."""
    owner, puller = start_node(1), start_node(2)
    owner.do(make, "source", True, *([1] if make is _make else []))
    puller.do(make, "target", False, *([0] if make is _make else []))
    nodes.link_pair(owner, puller, "small")
    puller.do(_pull_only, [1], [2])
    until_quiet(owner, puller)
    assert puller.do(_reads_of_a_pull, 0.55) == (reads, "OK")

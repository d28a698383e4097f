"""Few blocks by one native call: against a model, under every condition, and what it leaves."""

from __future__ import annotations

import gc
import os
import socket
import sys
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from datadist_shm import _native
from datadist_shm.known_ways import known_way
from hypothesis import given
from hypothesis import strategies as st

from datadist.testing.list_operations import Indexed, Whole
from datadist.transport import KnownWay
from tests.waiting import until

BLOCK, OURS, THEIRS = 64, 10, 14
"""Bytes of a block, and blocks of both caches."""
SIZE = 1 << 20
NOBODY, THREADS = -1, 1
ODD = [-1, 1 << 63, 1 << 70, True, 1.0, None, Whole(1), Indexed()]
Call = Callable[[Any, Any, float], "float | None"]


@dataclass
class World:
    """A way to memory of this process as if it were a peer's, and a peer that may say something."""

    tensors: int = 1
    write: bool = False
    mapped: bool = True
    block: int = BLOCK
    open: bool = True
    version: int = 1 << 40
    keys: dict[int, object] = field(default_factory=lambda: {7: "there"})

    def __post_init__(self) -> None:
        self.ours = np.zeros(SIZE, np.uint8)
        self.theirs = np.random.default_rng(1).integers(1, 255, SIZE).astype(np.uint8)
        self.control, self.peer = socket.socketpair()
        base = self.theirs.ctypes.data
        self.path = array(
            "q", [0, os.getpid(), NOBODY, self.control.fileno(), THREADS, 0, NOBODY, NOBODY]
        )
        self.path.extend([1, self.ours.ctypes.data, SIZE])
        self.path.extend([base, SIZE, base if self.mapped else 0, 0])
        self.fence = array("q", [0, 0])

    def close(self) -> None:
        self.control.close()
        self.peer.close()

    def bases(self, memory: Any) -> tuple[int, ...]:
        return tuple(memory.ctypes.data + n * SIZE // 4 for n in range(self.tensors))

    def way(self, **conditions: Any) -> KnownWay:
        found = {
            "attributes": ((self, "open", True), (self, "version", 1 << 40)),
            "keys": ((self.keys, 7, True), (self.keys, 8, False)), **conditions,
        }  # fmt: skip
        return KnownWay(
            1, self.write, self.block, self.bases(self.ours), self.block, OURS,
            self.bases(self.theirs), 2 * self.block, THEIRS, found["attributes"], found["keys"],
        )  # fmt: skip

    def call(self, **conditions: Any) -> Call:
        fence = self.fence.buffer_info()[0] if self.write else 0
        call = known_way(self.way(**conditions), self.path, fence, ())
        assert call is not None
        return call

    def expected(self, theirs: Sequence[int], ours: Sequence[int]) -> tuple[Any, Any]:
        """Our memory and theirs after a transfer."""
        mine, other = self.ours.copy(), self.theirs.copy()
        for tensor in range(self.tensors):
            for there, here in zip(theirs, ours, strict=True):
                a = tensor * SIZE // 4 + here * self.block
                b = tensor * SIZE // 4 + there * 2 * self.block
                if self.write:
                    other[b : b + self.block] = self.ours[a : a + self.block]
                else:
                    mine[a : a + self.block] = self.theirs[b : b + self.block]
        return mine, other

    def unchanged_by(self, act: Callable[[], object]) -> bool:
        before = self.ours.tobytes(), self.theirs.tobytes()
        act()
        return before == (self.ours.tobytes(), self.theirs.tobytes())


@pytest.fixture
def world() -> Iterator[Callable[..., World]]:
    with ExitStack() as made:

        def make(**options: Any) -> World:
            here = World(**options)
            made.callback(here.close)
            here.ours[:] = 9 if here.write else 0
            return here

        yield make


def _in_order(world: World, theirs: list[Any], ours: list[Any]) -> bool:
    written = theirs if world.write else ours
    return (
        0 < len(ours) == len(theirs)
        and len(ours) * world.tensors <= _native.BRIEF_SEGMENTS
        and all(type(b) is int and 0 <= b < THEIRS for b in theirs)
        and all(type(b) is int and 0 <= b < OURS for b in ours)
        and len(set(written)) == len(written)
    )


NUMBERS = st.integers(-1, THEIRS) | st.sampled_from(ODD)
LISTS = st.lists(st.tuples(NUMBERS, NUMBERS), max_size=18) | st.lists(
    st.tuples(st.integers(0, THEIRS - 1), st.integers(0, OURS - 1)), max_size=18
)


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("tensors", [1, 2, 3])
@given(pairs=LISTS, more=st.sampled_from([0, 0, 0, 1, -1]))
def test_it_moves_what_is_in_order_and_leaves_the_rest(
    tensors: int, write: bool, pairs: list[tuple[Any, Any]], more: int
) -> None:
    world = World(tensors=tensors, write=write)
    try:
        theirs, ours = [a for a, _ in pairs], [b for _, b in pairs]
        ours = ours + [0] if more > 0 else ours[:more] if more else ours
        if not _in_order(world, theirs, ours):
            assert world.unchanged_by(lambda: world.call()(theirs, ours, 1.0))
            assert world.call()(theirs, ours, 1.0) is None
            return
        mine, other = world.expected(theirs, ours)
        took = world.call()(theirs, ours, 1.0)
        assert took is not None
        assert 0 < took < 10
        assert (world.ours == mine).all()
        assert (world.theirs == other).all()
    finally:
        world.close()


@pytest.mark.parametrize("arguments", [((1,), [1]), ([1], (1,)), (None, [1]), ([1], np.array([1]))])
def test_what_is_no_list_is_left(world: Callable[..., World], arguments: tuple[Any, Any]) -> None:
    assert world().call()(*arguments, 1.0) is None


def test_no_more_than_takes_microseconds(world: Callable[..., World]) -> None:
    large = world(block=32 << 10)
    assert large.call()([0, 1], [0, 1], 1.0) is not None
    assert large.unchanged_by(lambda: large.call()([2, 3, 4], [2, 3, 4], 1.0))
    assert large.call()([2, 3, 4], [2, 3, 4], 1.0) is None
    several = world(tensors=3)
    assert several.call()([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], 1.0) is not None
    assert several.call()([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], 1.0) is None
    many = KnownWay(1, False, 8, (1,) * 17, 8, 1, (1,) * 17, 8, 1, (), ())
    assert known_way(many, several.path, 0, ()) is None


def _close(world: World) -> None:
    world.open = False


def _renew(world: World) -> None:
    world.version += 1


def _let_go(world: World) -> None:
    del world.keys[7]


def _lose(world: World) -> None:
    world.keys[8] = "gone"


def _abort(world: World) -> None:
    world.path[0] = 1


def _revoke(world: World) -> None:
    world.fence[1] = 1


def _nobody(world: World) -> None:
    world.path[3] = NOBODY


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("change", [_close, _renew, _let_go, _lose, _abort])
def test_what_does_not_hold_any_more_stops_it(
    world: Callable[..., World], write: bool, change: Callable[[World], None]
) -> None:
    here = world(write=write)
    call = here.call()
    assert call([1], [2], 1.0) is not None
    change(here)
    assert here.unchanged_by(lambda: call([3], [4], 1.0))
    assert call([3], [4], 1.0) is None


def test_a_fence_that_is_revoked_stops_a_write(world: Callable[..., World]) -> None:
    here = world(write=True)
    _revoke(here)
    assert here.unchanged_by(lambda: here.call()([3], [4], 1.0))
    assert here.call()([3], [4], 1.0) is None
    assert here.fence[0] == 0


@pytest.mark.parametrize("hear", [lambda world: world.peer.send(b"x"), _nobody])
def test_a_read_during_which_something_arrives_is_not_done(
    world: Callable[..., World], hear: Callable[[World], None]
) -> None:
    here = world()
    call = here.call()
    hear(here)
    assert call([1], [2], 1.0) is None


@pytest.mark.parametrize("hear", [lambda world: world.peer.close(), _nobody])
def test_a_write_after_which_something_arrived_is_not_begun(
    world: Callable[..., World], hear: Callable[[World], None]
) -> None:
    here = world(write=True)
    call = here.call()
    hear(here)
    assert here.unchanged_by(lambda: call([1], [2], 1.0))
    assert call([1], [2], 1.0) is None


def test_without_a_look_at_the_pages_memory_of_a_process_is_left(
    world: Callable[..., World],
) -> None:
    """Its pages may never come: that takes a thread of its own."""
    assert world(mapped=False).call()([1], [2], 1.0) is None


def test_memory_of_a_process_whose_pages_exist(world: Callable[..., World]) -> None:
    here = world(mapped=False)
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        here.path[6] = here.path[7] = pagemap
        mine, _ = here.expected([1, 5], [2, 3])
        assert here.call()([1, 5], [2, 3], 1.0) is not None
        assert (here.ours == mine).all()
    finally:
        os.close(pagemap)


def test_a_time_that_is_over_is_left(world: Callable[..., World]) -> None:
    assert world().call()([1], [2], 0.0) is None


def test_what_is_no_call_is_refused(world: Callable[..., World]) -> None:
    here = world()
    call: Any = here.call()
    for arguments in ((), ([1], [2]), ([1], [2], 1.0, 1), ([1], [2], "1")):
        with pytest.raises(TypeError):
            call(*arguments)
    with pytest.raises(AttributeError, match="unknown"):
        here.call(attributes=((here, "unknown", 1),))([1], [2], 1.0)
    good = array("q", [0, 0, 8, 1, 8, 1, 8, 1, 1, 1]).tobytes()
    bad: list[tuple[Any, ...]] = [
        (here.path, good, ()), (here.path, good[:-8], (), ()), (here.path, b"", (), ()),
        (here.path, array("q", [0, 0, 8, 17, 8, 1, 8, 1, *[1] * 34]).tobytes(), (), ()),
        (here.path, bytearray(good), (), ()), (here.path, good, (1,), ()),
        (here.path, good, (), ([], 1, True)), (here.path, good, [], ()),
    ]  # fmt: skip
    for arguments in bad:
        with pytest.raises(TypeError):
            _native.known_way(*arguments)
    with pytest.raises(BufferError):
        _native.known_way(b"12345678", good, (), ())([0], [0], 1.0)
    with pytest.raises(ValueError, match="path"):
        _native.known_way(array("q", [0]), good, (), ())([0], [0], 1.0)


def test_it_keeps_no_reference_and_no_buffer(world: Callable[..., World]) -> None:
    here = world()
    call, theirs, ours = here.call(), [1000 - 999, 1 << 70], [2, 3]
    objects = [here, here.path, here.keys, theirs, ours]
    counts = [sys.getrefcount(each) for each in objects]
    for _ in range(50):
        assert call(theirs, ours, 1.0) is None
        assert call([1], [2], 1.0) is not None
        here.version += 1
        assert call([1], [2], 1.0) is None
        here.version -= 1
    assert [sys.getrefcount(each) for each in objects] == counts
    here.path.append(0)


class Circle:
    """What a call looks at, and what has the call."""

    fine = True
    call: Call | None = None


def test_a_circle_through_it_is_collected(world: Callable[..., World]) -> None:
    here, circle = world(), Circle()
    circle.call = here.call(attributes=((circle, "fine", True),))
    seen = weakref.ref(circle)
    del circle
    until(lambda: gc.collect() >= 0 and seen() is None)  # none where another thread collects

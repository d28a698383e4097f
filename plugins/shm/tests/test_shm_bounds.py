"""The native transfer by itself: segments that are nowhere, the fence around each write, vectors."""

from __future__ import annotations

import ctypes
import os
from array import array
from typing import Any

import numpy as np
import pytest
from datadist_shm import _native

SIZE = 4096
THREADS, PLAIN, NOBODY = 1, 0, -1
NEVER, FOREVER = 0.0, 30.0


class Path:
    """A way to memory of this process, as if it were a peer's, with room around it."""

    def __init__(self, mapped: bool) -> None:
        self._theirs, self._ours = (np.full(3 * SIZE, fill, np.uint8) for fill in (7, 0))
        self.theirs, self.ours = (each[SIZE : 2 * SIZE] for each in (self._theirs, self._ours))
        base = self.theirs.ctypes.data
        self.words = array("q", [0, os.getpid(), NOBODY, NOBODY, THREADS, PLAIN, NOBODY, NOBODY])
        self.words.extend([1, self.ours.ctypes.data, SIZE])  # as if it were a pool's
        self.words.extend([base, SIZE, base if mapped else 0, 0])
        self.fence = (ctypes.c_int64 * 2)()
        """Writers inside, and whether writing was revoked."""

    def move(
        self, write: bool, shift: int = 0, length: int = SIZE, local: int | None = None,
        seconds: float = FOREVER,
    ) -> bool | tuple[Any, ...]:  # fmt: skip
        """Move ``length`` bytes between our start and ``shift`` bytes from theirs."""
        here = self.ours.ctypes.data if local is None else local
        vectors = ([n] for n in (here, self.theirs.ctypes.data + shift, length))
        fence = ctypes.addressof(self.fence) if write else 0
        a, b, c = (array("q", vector) for vector in vectors)
        return _native.transfer(write, self.words, a, b, c, fence, seconds, [])

    def vectors(self, shift: int, length: int) -> list[array[int]]:
        """One segment of ``length`` bytes, to our start from ``shift`` bytes after theirs."""
        here, there = self.ours.ctypes.data, self.theirs.ctypes.data + shift
        return [array("q", [number]) for number in (here, there, length)]

    def untouched(self) -> bool:
        return bool((self._theirs == 7).all()) and not self._ours.any()


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize(
    ("shift", "length"),
    [
        (0, 0), (0, -1), (8, -8), (0, -(1 << 63)), (0, SIZE + 1), (1, SIZE), (SIZE - 1, 2),
        (SIZE, 1), (-1, 1), (-1, SIZE), (-SIZE, SIZE), (0, (1 << 63) - 1),
    ],
)  # fmt: skip
def test_segments_that_are_not_inside_move_nothing(
    mapped: bool, write: bool, shift: int, length: int
) -> None:
    path = Path(mapped)
    assert path.move(write, shift, length) == (_native.BAD_ADDRESS, 0, 0)
    assert path.untouched()
    assert path.fence[0] == 0


@pytest.mark.parametrize("local", [0, -1, -(1 << 63)])
@pytest.mark.parametrize("write", [True, False])
def test_our_own_addresses_are_positive(local: int, write: bool) -> None:
    path = Path(True)
    assert path.move(write, local=local) == (_native.BAD_ADDRESS, 0, 0)
    assert path.untouched()


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize(("shift", "length"), [(0, SIZE), (SIZE - 1, 1), (1, SIZE - 1), (0, 1)])
def test_segments_at_the_border_are_inside(mapped: bool, shift: int, length: int) -> None:
    path = Path(mapped)
    assert path.move(False, shift, length) is True
    assert int((path.ours == 7).sum()) == length


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize(
    ("revoked", "aborted", "seconds", "expected"),
    [
        (0, 0, FOREVER, None),
        (1, 0, FOREVER, _native.REVOKED),
        (0, 1, FOREVER, _native.ABORTED),
        (0, 0, NEVER, _native.TIMED_OUT),
    ],
)
def test_a_writer_has_left_the_fence_however_it_ends(
    mapped: bool, revoked: int, aborted: int, seconds: float, expected: int | None
) -> None:
    path = Path(mapped)
    path.fence[1], path.words[0] = revoked, aborted
    for _ in range(2):
        answer = path.move(True, seconds=seconds)
        assert path.fence[0] == 0
        if expected is None:
            assert answer is True
            assert not path.theirs.any()
        else:
            assert isinstance(answer, tuple)
            assert answer[0] == expected
            assert path.untouched()


@pytest.mark.parametrize("mapped", [True, False])
def test_what_arrived_meanwhile_is_told(mapped: bool) -> None:
    reading, writing = os.pipe()
    try:
        path = Path(mapped)
        path.words[3] = reading
        assert path.move(False) is False
        os.write(writing, b"news")
        assert path.move(False) is True
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize(("shift", "seconds"), [(0, FOREVER), (SIZE, FOREVER), (0, NEVER)])
def test_no_vector_is_held_after_a_transfer(shift: int, seconds: float) -> None:
    """However it ends: one that is held could not be made longer, and would never be freed."""
    path = Path(True)
    here, there, length = path.vectors(shift, 1)
    _native.transfer(False, path.words, here, there, length, 0, seconds, [])
    for vector in (path.words, here, there, length):
        vector.append(0)


def test_no_vector_is_held_after_a_copy() -> None:
    path = Path(True)
    here, there, length = path.vectors(0, SIZE)
    _native.copy(here, there, length, THREADS, PLAIN)
    assert (path.ours == 7).all()
    for vector in (here, there, length):
        vector.append(0)

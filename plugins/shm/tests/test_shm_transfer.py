"""The native transfer by itself: an abort at any moment, and a pid that is another process's now."""

from __future__ import annotations

import os
import subprocess
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from datadist_shm import _native
from numpy.typing import NDArray

from tests import tasks
from tests.nodes import Here

CHUNK = 512 << 10
"""Bytes between two looks at the abort flag."""
SIZE = 3 * CHUNK
THREADS, PLAIN, NOBODY = 1, 0, -1


class Path:
    """A way to memory of this process, as if it were a peer's; mapped here, or reached by its pid."""

    def __init__(self, pidfd: int = NOBODY, mapped: bool = True) -> None:
        self.theirs = np.full(SIZE, 7, np.uint8)
        self.ours = np.zeros(SIZE, np.uint8)
        base = self.theirs.ctypes.data
        self.words = array("q", [0, os.getpid(), pidfd, NOBODY, THREADS, PLAIN, NOBODY, NOBODY])
        self.words.extend([1, self.ours.ctypes.data, SIZE])  # as if it were a pool's
        self.words.extend([base, SIZE, base if mapped else 0, 0])

    def move(
        self, write: bool = False, to: int | None = None, size: int = SIZE
    ) -> bool | tuple[Any, ...]:
        """Move bytes from or to the start of their memory; the first 8 from or to ``to`` instead."""
        local = array("q", [self.ours.ctypes.data])
        remote = array("q", [self.theirs.ctypes.data])
        length = array("q", [size])
        if to is not None:
            local, length = array("q", [to, local[0]]), array("q", [8, size - 8])
            remote.append(remote[0] + 8)
            if size == 8:
                local, remote, length = local[:1], remote[:1], length[:1]
        return _native.transfer(write, self.words, local, remote, length, 0, 30.0, [])

    @property
    def flag(self) -> int:
        """The address of the abort flag."""
        return self.words.buffer_info()[0]


def test_what_is_whole_is_a_success() -> None:
    path = Path()
    assert path.move() is True  # nothing is known of a control descriptor
    assert (path.ours == 7).all()


@pytest.mark.parametrize("mapped", [True, False])
def test_an_abort_in_the_only_chunk_is_no_success(mapped: bool) -> None:
    """The copy itself sets the flag: after the look ahead of the chunk, before the end."""
    path = Path(mapped=mapped)
    assert path.move(to=path.flag, size=8) == (_native.ABORTED, 0, 0)


@pytest.mark.parametrize("mapped", [True, False])
def test_after_an_abort_no_further_chunk_is_moved(mapped: bool) -> None:
    path = Path(mapped=mapped)
    answer = path.move(to=path.flag)
    assert isinstance(answer, tuple)
    assert answer[0] == _native.ABORTED
    assert (path.ours[: CHUNK - 8] == 7).all()
    assert not path.ours[CHUNK - 8 :].any()


def test_an_abort_in_the_last_chunk_of_several_is_no_success() -> None:
    path = Path()
    ours, theirs = path.ours.ctypes.data, path.theirs.ctypes.data
    answer = _native.transfer(
        False,
        path.words,
        array("q", [ours, path.flag]),
        array("q", [theirs, theirs + SIZE - 8]),
        array("q", [SIZE - 8, 8]),
        0,
        30.0,
        [],
    )
    assert isinstance(answer, tuple)
    assert answer[0] == _native.ABORTED
    assert (path.ours[: SIZE - 8] == 7).all()


# -- threads -------------------------------------------------------------------------------------

ENDLESS = 100_000
"""Segments that take many seconds, however fast the machine."""


def _endless(path: Path, seconds: float) -> bool | tuple[Any, ...]:
    path.words[4] = 4
    local, remote, length = (
        array("q", [n]) * ENDLESS for n in (path.ours.ctypes.data, path.theirs.ctypes.data, SIZE)
    )
    return _native.transfer(False, path.words, local, remote, length, 0, seconds, [])


def _an_abort_ends_helpers(_here: Here) -> None:
    path, before = Path(), tasks.count()

    def abort() -> None:
        seen.append(tasks.rises_to(before + 1 + 3))
        path.words[0] = 1

    seen: list[bool] = []
    with tasks.meanwhile(abort):
        answer = _endless(path, 60)
    assert isinstance(answer, tuple)
    assert answer[0] == _native.ABORTED
    assert seen == [True], "three helpers and the caller"
    assert tasks.falls_to(before), "helpers outlive their transfer"


def _a_deadline_ends_helpers(_here: Here) -> None:
    path, before = Path(), tasks.count()
    answer = _endless(path, 0.3)
    assert isinstance(answer, tuple)
    assert answer[0] == _native.TIMED_OUT
    assert tasks.falls_to(before), "helpers outlive their transfer"


@pytest.mark.parametrize("end", [_an_abort_ends_helpers, _a_deadline_ends_helpers])
def test_what_ends_a_transfer_ends_its_helpers(end: Callable[[Here], None]) -> None:
    tasks.with_helpers(end)


# -- a process that has ended, whose pid another one has -----------------------------------------


@pytest.fixture
def ended() -> Iterator[int]:
    """The pidfd of a process that has ended; its pid may be anybody's."""
    with subprocess.Popen(["true"]) as process:
        pidfd = os.pidfd_open(process.pid)
    yield pidfd
    os.close(pidfd)


def _untouched(memory: NDArray[np.uint8], value: int) -> bool:
    return bool((memory == value).all())


@pytest.mark.parametrize("write", [False, True])
def test_memory_of_the_process_that_has_the_pid_now_is_not_touched(ended: int, write: bool) -> None:
    path = Path(pidfd=ended, mapped=False)
    answer = path.move(write)
    assert isinstance(answer, tuple)
    assert answer[0] == _native.PEER_GONE
    assert _untouched(path.ours, 0)
    assert _untouched(path.theirs, 7)


def test_mapped_memory_of_a_process_that_has_ended_is_no_success(ended: int) -> None:
    answer = Path(pidfd=ended).move()
    assert isinstance(answer, tuple)
    assert answer[0] == _native.PEER_GONE


def test_the_same_pid_with_its_own_process_is_served() -> None:
    pidfd = os.pidfd_open(os.getpid())
    try:
        path = Path(pidfd=pidfd, mapped=False)
        assert path.move() is True  # nothing is known of a control descriptor
        assert _untouched(path.ours, 7)
    finally:
        os.close(pidfd)

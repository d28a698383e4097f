"""A transfer that may have to wait for pages, where the threads that would move it cannot be started."""

from __future__ import annotations

import errno
import os
import resource
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from datadist_shm import _native

from tests import tasks
from tests.nodes import Here

SIZE = 16 << 20
"""Bytes that are worth several threads."""
PLAIN, NOBODY = 0, -1


class Path:
    """A way to memory of this process by its pid, as if it were a peer's; nothing is of a pool."""

    def __init__(self) -> None:
        self.theirs, self.ours = np.full(SIZE, 7, np.uint8), np.zeros(SIZE, np.uint8)
        self._vectors = [
            array("q", [number])
            for number in (self.ours.ctypes.data, self.theirs.ctypes.data, SIZE)
        ]
        self._words = array("q", [0, os.getpid(), NOBODY, NOBODY, 1, PLAIN, NOBODY, NOBODY, 0])
        self._words.extend([self.theirs.ctypes.data, SIZE, 0, 0])

    def move(self, threads: int) -> bool | tuple[Any, ...]:
        """Read all of it."""
        self._words[4] = threads
        local, remote, length = self._vectors
        return _native.transfer(False, self._words, local, remote, length, 0, 30.0, [])


@contextmanager
def _no_more_memory() -> Iterator[None]:
    """The process can map nothing more, such as the stack of a thread."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _fails_and_leaves_nothing(threads: int) -> None:
    path, before = Path(), tasks.count()
    with _no_more_memory():
        answer = path.move(threads)
    assert isinstance(answer, tuple)
    assert (answer[0], answer[2]) == (_native.FAILED, errno.EAGAIN)
    assert tasks.falls_to(before), "helpers outlive their transfer"
    assert path.move(threads) is True
    assert (path.ours == 7).all()


def _without_any_thread(_here: Here) -> None:
    _fails_and_leaves_nothing(1)


def _with_helpers_but_no_leader(_here: Here) -> None:
    """The C library keeps the stack of a thread that has ended: it suffices for one helper."""
    assert Path().move(1) is True
    _fails_and_leaves_nothing(4)


@pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""),
    reason="a sanitizer ends a process that can map nothing more",
)
@pytest.mark.parametrize("case", [_without_any_thread, _with_helpers_but_no_leader])
def test_a_transfer_for_which_no_thread_can_be_had_fails_and_leaves_nothing(case: Any) -> None:
    tasks.with_helpers(case)

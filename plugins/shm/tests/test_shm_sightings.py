"""Small transfers of registered memory look into the page tables once in a moment, not each time."""

from __future__ import annotations

import mmap
import os
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from datadist_shm import _native

PAGE = mmap.PAGESIZE
TIMES = 1000
STAT = Path("/proc/thread-self/io")


def _path(own: int, peer: int, base: int, size: int) -> array[int]:
    """What native code knows of a peer, here this process itself, whose memory is not mapped."""
    kernel = _native.KERNELS["memcpy"]
    return array("q", [0, os.getpid(), -1, -1, 1, kernel, own, peer, 0, base, size, 0, 0])


def _reads() -> int:
    lines = dict(line.split(": ") for line in STAT.read_text().splitlines())
    return int(lines["syscr"])


@pytest.fixture
def pagemap() -> Iterator[int]:
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    yield fd
    os.close(fd)


@pytest.mark.skipif(not STAT.exists(), reason="the kernel counts no reads of threads")
@pytest.mark.parametrize("size", [PAGE, 5 * PAGE + 1], ids=["page", "pages"])
def test_what_was_just_seen_is_not_looked_at_again(pagemap: int, size: int) -> None:
    memory = np.ones((2, 16 * PAGE), np.uint8)
    mine, theirs = (row.ctypes.data for row in memory)
    path = _path(pagemap, pagemap, theirs, memory.shape[1])
    local, remote, length = (array("q", [number]) for number in (mine, theirs, size))
    before = _reads()
    for _ in range(TIMES):
        assert _native.transfer(False, path, local, remote, length, 0, 60.0, []) is True
    assert _reads() - before < TIMES, "each transfer looks, at both ends"

"""Registered memory where the kernel moves less than it was asked to: the rest follows, or an error."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from datadist_shm import ShmTransport
from datadist_shm.fence import Fence
from numpy.typing import NDArray

from datadist.rank_table import RankTable
from datadist.transport import (
    Access,
    AddressError,
    Group,
    Link,
    Offer,
    Peer,
    TransportOptions,
)

SIZE, PAGE = 1 << 20, mmap.PAGESIZE
MOST = 1000
"""Bytes that a call into another process moves here."""
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/uio.h>

typedef ssize_t Move(pid_t, const struct iovec *, unsigned long, const struct iovec *, unsigned long,
                     unsigned long);
long shortened;

static unsigned long cut(struct iovec *some, const struct iovec *all, unsigned long count)
{
    size_t left = MOST;
    unsigned long n = 0;
    for (; n < count && left > 0; n++) {
        some[n] = all[n];
        if (some[n].iov_len > left)
            some[n].iov_len = left;
        left -= some[n].iov_len;
    }
    shortened += left == 0;
    return n;
}

static ssize_t move(const char *name, pid_t pid, const struct iovec *l, unsigned long nl,
                    const struct iovec *r, unsigned long nr, unsigned long flags)
{
    struct iovec local[1024], remote[1024];
    unsigned long n = cut(local, l, nl), m = cut(remote, r, nr);
    return ((Move *)dlsym(RTLD_NEXT, name))(pid, local, n, remote, m, flags);
}

ssize_t process_vm_readv(pid_t p, const struct iovec *l, unsigned long nl, const struct iovec *r,
                         unsigned long nr, unsigned long f)
{
    return move("process_vm_readv", p, l, nl, r, nr, f);
}

ssize_t process_vm_writev(pid_t p, const struct iovec *l, unsigned long nl, const struct iovec *r,
                          unsigned long nr, unsigned long f)
{
    return move("process_vm_writev", p, l, nl, r, nr, f);
}
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that, loaded first, makes every such call a short one."""
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    library = folder / "shim.so"
    command = ["cc", "-shared", "-fPIC", f"-DMOST={MOST}", str(folder / "shim.c"), "-o"]
    subprocess.run([*command, str(library), "-ldl"], check=True)
    return library


# -- an owner of memory, and a link to it --------------------------------------------------------

OWNER = """
import ctypes, mmap, sys
size, first, length = map(int, sys.argv[1:])
memory = mmap.mmap(-1, size)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
memory[:] = (bytes(range(251)) * (size // 251 + 1))[:size]
unmap = ctypes.CDLL(None).munmap
assert not length or unmap(ctypes.c_void_p(address + first), ctypes.c_size_t(length)) == 0
print(address, flush=True)
sys.stdin.read()
"""


class Owner:
    """Another process with memory of its own, of which some pages may be unmapped; and our link."""

    def __init__(self, process: subprocess.Popen[str], link: Link, address: int) -> None:
        self.link = link
        self.address = address
        self._pid = process.pid

    def memory(self, size: int = SIZE) -> NDArray[np.uint8]:
        """A copy, not by way of the transport."""
        with open(f"/proc/{self._pid}/mem", "rb", 0) as memory:
            return np.frombuffer(os.pread(memory.fileno(), size, self.address), np.uint8)


@contextmanager
def owner(first: int = 0, length: int = 0) -> Iterator[Owner]:
    """One whose memory lacks ``length`` bytes from ``first`` on."""
    command = [sys.executable, "-c", OWNER, *map(str, (SIZE, first, length))]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        address, pidfd = int(process.stdout.readline()), os.pidfd_open(process.pid)
        peers = {0: Peer(0, "us"), 1: Peer(1, "owner", process.pid, pidfd)}
        group = Group("short", 0, peers, RankTable("1.0", ()), time.monotonic() + 60)
        link = ShmTransport(TransportOptions()).open(group, [], Access.READ_WRITE)
        region = {"id": 1, "address": address, "size": SIZE, "fd": None}
        offer = {"version": 1, "writable": True, "regions": [region], "fence": 0}
        link.attach(1, Offer(json.dumps(offer).encode(), [Fence().take_fd()]))
        try:
            yield Owner(process, link, address)
        finally:
            link.close()
            os.close(pidfd)
            process.kill()


def _move(
    them: Owner, write: bool, mine: NDArray[np.uint8], local: object, remote: object, length: object
) -> None:
    """Offsets into both memories, and bytes."""
    vectors = [np.array(each, np.int64) for each in (local, remote, length)]
    move = them.link.write if write else them.link.read
    move(1, mine.ctypes.data + vectors[0], them.address + vectors[1], vectors[2], 30)


@pytest.mark.parametrize("write", [False, True])
def test_the_rest_is_moved(shim: Path, write: bool) -> None:
    here = Path(__file__)
    path = os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])
    first = f"{os.environ.get('LD_PRELOAD', '')} {shim}"  # a sanitizer comes before all others
    done = subprocess.run(
        [sys.executable, "-c", f"import {here.stem}; {here.stem}.move_and_compare({write})"],
        env={**os.environ, "LD_PRELOAD": first.strip(), "PYTHONPATH": path},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def move_and_compare(write: bool) -> None:
    """In a process with the shim: move pieces of many sizes, and compare all of both memories."""
    random = np.random.default_rng(5)
    mine = random.integers(0, 256, SIZE, np.uint8)
    lengths = random.choice([1, 7, MOST - 1, MOST, MOST + 1, PAGE, 5 * MOST], 300)
    ends = np.cumsum(lengths + 3)
    assert ends[-1] < SIZE
    order = random.permutation(len(lengths))
    lengths, local = lengths[order], (ends - lengths - 3)[order]
    remote = SIZE - ends[order]  # the other way around
    with owner() as them:
        theirs = them.memory()
        source, target = (mine.copy(), theirs.copy()) if write else (theirs, mine.copy())
        for at, to, size in zip(local, remote, lengths, strict=True):
            frm, goal = (at, to) if write else (to, at)
            target[goal : goal + size] = source[frm : frm + size]
        _move(them, write, mine, local, remote, lengths)
        assert ctypes.c_long.in_dll(ctypes.CDLL(None), "shortened").value > len(lengths)
        after = (mine, them.memory()) if write else (them.memory(), mine)
    assert np.array_equal(after[0], source)
    assert np.array_equal(after[1], target)


@pytest.mark.parametrize("write", [False, True])
def test_memory_that_is_unmapped_in_part_is_an_error(write: bool) -> None:
    """The kernel moves what lies before it, and says so by a short count."""
    hole = 5 * PAGE
    with owner(hole, PAGE) as them:
        mine = np.full(10 * PAGE, 255, np.uint8)
        before = them.memory(hole)
        pages = np.arange(10) * PAGE
        cases: list[tuple[object, object, object]] = [
            ([0], [0], [10 * PAGE]),
            (pages, pages, [PAGE] * 10),
            ([0, PAGE], [hole, 0], [PAGE, PAGE]),
            ([0], [hole + PAGE - 1], [1]),
        ]
        for local, remote, length in cases:
            with pytest.raises(AddressError, match="not mapped any more"):
                _move(them, write, mine, local, remote, length)
        _move(them, write, mine, [0], [0], [hole])
        assert np.array_equal(mine[:hole], them.memory(hole))
        assert np.array_equal(mine[:hole], before) != write
        _move(them, write, mine, [hole + PAGE], [hole + PAGE], [PAGE])

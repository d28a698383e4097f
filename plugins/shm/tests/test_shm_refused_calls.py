"""The shm transport where system calls are refused."""

from __future__ import annotations

import errno
import mmap
import os
from array import array
from pathlib import Path

import pytest
from datadist_shm import ShmTransport, memory, pages
from datadist_shm.memory import PoolRegion

from datadist.transport import Access, Group, Peer, Placement, TransportOptions
from tests import namespaces, seccomp
from tests.privileges import in_child

pytestmark = seccomp.needed

REFUSALS = [errno.EPERM, errno.ENOSYS, errno.EACCES]
SIZE = 4 << 20


def _pool() -> PoolRegion:
    region = ShmTransport(TransportOptions()).allocate(SIZE, Placement.HOST)
    assert isinstance(region, PoolRegion)
    region.wait_filled(60)
    return region


@pytest.mark.parametrize("error", REFUSALS)
@pytest.mark.parametrize("call", ["memfd_create", "fcntl"])
def test_probe_names_a_call_that_pools_need(call: str, error: int) -> None:
    def look() -> object:
        seccomp.install([call], error)
        return ShmTransport.probe()

    text = in_child(look)
    assert "usable=False" in text
    assert f"{call}" in text
    assert "seccomp profile" in text


@pytest.mark.parametrize("error", REFUSALS)
@pytest.mark.parametrize(
    "calls", [["fallocate"], ["madvise"], ["fallocate", "madvise"]], ids="+".join
)
def test_without_these_pages_are_made_in_another_way(calls: list[str], error: int) -> None:
    def look() -> object:
        seccomp.install(calls, error)
        region = _pool()
        return region.filled, os.fstat(region.fd).st_blocks * 512 >= SIZE

    assert in_child(look) == "(True, True)"


def test_pools_of_small_pages_are_populated_without_madvise() -> None:
    """Nobody can map while it populates, also while its thread waits for a processor."""

    def look() -> object:
        seccomp.install(["madvise"], errno.ENOMEM)  # which is no refusal
        region = ShmTransport(TransportOptions(extra={"huge_pages": "0"})).allocate(
            SIZE, Placement.HOST
        )
        assert isinstance(region, PoolRegion)
        region.wait_filled(60)
        return region.filled

    if pages.transparent():
        pytest.skip("this machine has huge pages for shared memory")  # only a mapping asks for them
    assert in_child(look) == "True"


@pytest.mark.parametrize("error", REFUSALS)
def test_without_the_set_of_processors_all_are_taken(error: int) -> None:
    def look() -> object:
        seccomp.install(["sched_getaffinity"], error)
        return ShmTransport(TransportOptions()).describe()["threads"]

    assert int(in_child(look)) == min(os.cpu_count() or 1, 4)


class Pair:
    """A pool of an owner, and another one of a reader that is attached to it, in this process."""

    def __init__(self, access: Access, populate: str) -> None:
        owner = ShmTransport(TransportOptions(extra={"populate": populate}))
        theirs, self.mine = owner.allocate(SIZE, Placement.HOST), _pool()
        assert isinstance(theirs, PoolRegion)
        self.theirs = theirs
        peers = {0: Peer(0, "owner", os.getpid()), 1: Peer(1, "reader", os.getpid())}
        offering, self.link = (
            ShmTransport(TransportOptions()).open(
                Group("pair", rank, peers, None, 1e12), [region], access
            )
            for rank, region in enumerate((theirs, self.mine))
        )
        self.link.attach(0, offering.offer(1))
        self.segments = (
            array("q", [self.mine.address]),
            array("q", [theirs.address]),
            array("q", [SIZE]),
        )


@pytest.mark.parametrize("populate", ["1", "0"])
@pytest.mark.parametrize("error", REFUSALS)
def test_without_mincore_pools_are_read_and_written(error: int, populate: str) -> None:
    def look() -> object:
        seccomp.install(["mincore"], error)
        pair = Pair(Access.READ_WRITE, populate)
        _bytes(pair.mine)[:8] = b"12345678"
        pair.link.write(0, *pair.segments, 60)
        _bytes(pair.mine)[:8] = b"00000000"
        pair.link.read(0, *pair.segments, 60)
        return bytes(_bytes(pair.mine)[:8]), bytes(_bytes(pair.theirs)[:8])

    assert in_child(look) == "(b'12345678', b'12345678')"


def test_without_mincore_reading_makes_no_page() -> None:
    def look() -> object:
        seccomp.install(["mincore"])
        pair = Pair(Access.READ, populate="0")
        pair.link.read(0, *pair.segments, 60)
        return os.fstat(pair.theirs.fd).st_blocks

    assert in_child(look) == "0"


@namespaces.needed
def test_memory_is_made_where_it_must_not_be_executable() -> None:
    sysctl = Path("/proc/sys/vm/memfd_noexec")
    if not sysctl.exists():
        pytest.skip("this kernel has no vm.memfd_noexec")

    def look() -> object:
        namespaces.enter_new(["pid"])
        sysctl.write_text("2")
        return memory.unusable()

    assert in_child(look) == "None"


def _bytes(region: PoolRegion) -> memoryview:
    return memoryview(mmap.mmap(region.fd, region.size))

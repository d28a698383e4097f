"""Huge pages that are made on demand, where the kernel offers none to programs that merely ask."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datadist_shm import ShmTransport, _native, memory, pages
from datadist_shm.memory import PeerFile, PeerMapping, PoolRegion

from datadist import empty
from datadist.base.memory_file import create_sealed
from datadist.transport import Placement, TransportOptions
from tests import processors, seccomp
from tests.descriptors import is_open
from tests.privileges import in_child
from tests.resident import resident
from tests.waiting import until

MIB = 1 << 20
HUGE = 2 * MIB
COLLAPSE = 25
"""MADV_COLLAPSE of Linux 6.1; not in Python's module."""
GO_ON, STOP = array("q", [0]), array("q", [1])


def _on_demand() -> bool:
    """Whether this kernel makes huge pages on demand; it may be short of memory for one just now."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    with _file(2 * HUGE) as (fd, address):
        os.posix_fallocate(fd, 0, 1)
        done = madvise(ctypes.c_void_p(address), HUGE, COLLAPSE) == 0
        return done or ctypes.get_errno() != errno.EINVAL


@contextmanager
def _file(size: int, huge: bool = True) -> Iterator[tuple[int, int]]:
    """A file of memory and where it is mapped."""
    fd = create_sealed("huge", size)
    address = _native.map(fd, size, True, huge)
    try:
        yield fd, address
    finally:
        _native.unmap(address, size)
        os.close(fd)


needed = pytest.mark.skipif(
    not _on_demand(), reason="this machine has no huge pages for shared memory"
)


def _pool(size: int, wait: bool = True, **extra: str) -> PoolRegion:
    region = ShmTransport(TransportOptions(extra=extra)).allocate(size, Placement.HOST)
    assert isinstance(region, PoolRegion)
    if wait:
        region.wait_filled(60)
    return region


def _make(fd: int, address: int, size: int, left: bytearray | None = None) -> int:
    left = bytearray(size // HUGE) if left is None else left
    return _native.huge_make(address, size, fd, 0, left, GO_ON)[0]


def _huge(address: int) -> int:
    return resident(address, "ShmemPmdMapped")


@needed
@pytest.mark.parametrize(
    "size", [HUGE - 4096, HUGE, HUGE + 4096, 16 * MIB, 18 * MIB, 70 * MIB + 8192], ids=str
)
def test_a_pool_has_huge_pages_but_for_its_rest(size: int) -> None:
    pool = _pool(size)
    assert _huge(pool.address) == size // HUGE * HUGE
    assert os.fstat(pool.fd).st_blocks * 512 >= size
    assert ctypes.string_at(pool.address, size) == bytes(size)
    pool.close()


def test_a_pool_has_none_where_that_is_chosen() -> None:
    pool = _pool(8 * MIB, huge_pages="0")
    assert _huge(pool.address) == 0
    pool.close()


@needed
def test_a_peer_maps_each_in_one_step() -> None:
    pool = _pool(8 * MIB)
    theirs = PeerMapping(
        pool.fd, pool.size, writable=False, huge=True, file=PeerFile((0, 0), False)
    )
    assert theirs.address % HUGE == 0
    assert resident(theirs.address) == 0
    ctypes.string_at(theirs.address + 3 * MIB, 1)
    assert resident(theirs.address) == HUGE
    pool.close()


@needed
def test_what_is_in_use_is_copied_afterwards() -> None:
    """Whoever writes before a page is made, or while it is, finds that in the huge page."""
    size = 32 * MIB
    with _file(size) as (fd, address):
        os.pwrite(fd, b"first", 5 * MIB)
        blocks, left = os.fstat(fd).st_blocks, bytearray(size // HUGE)
        assert _make(fd, address, size, left) == _native.HUGE_MADE
        begun = sum(left) - left[2]  # on a busy machine: these have one small page
        assert left[2]
        assert _huge(address) == size - HUGE * sum(left)
        assert os.fstat(fd).st_blocks - blocks == (_huge(address) + begun * mmap.PAGESIZE) // 512
        _native.populate(address, size, 1, fd, 0)
        ctypes.memmove(address + 5 * MIB + 5, b" second", 7)
        _native.huge_merge(address, left, GO_ON)
        assert not any(left)
        assert _huge(address) == size
        assert ctypes.string_at(address + 5 * MIB, 12) == b"first second"
        assert ctypes.string_at(address, size).count(0) == size - 12


@needed
@processors.needed
def test_where_they_take_long_none_is_made_while_no_processor_is_spare() -> None:
    size = 16 * MIB
    left = bytearray(size // HUGE)
    with _file(size) as (fd, address):
        with processors.busy():
            how = _native.huge_make(address, size, fd, 0, left, GO_ON, True)
        assert how == (_native.HUGE_MADE, True)
        assert all(left)
        assert _huge(address) == 0
        _native.populate(address, size, 1, fd, 0)
        _native.huge_merge(address, left, GO_ON, True)
        assert not any(left)
        assert _huge(address) == size


@needed
def test_nothing_is_lost_that_is_written_meanwhile() -> None:
    size = 64 * MIB
    pool = ShmTransport(TransportOptions()).allocate(size, Placement.HOST)
    assert isinstance(pool, PoolRegion)
    words = np.ctypeslib.as_array((ctypes.c_int64 * (size // 8)).from_address(pool.address))
    written = np.zeros(size // 8, bool)
    rng = np.random.default_rng(7)
    end = time.monotonic() + 10
    while not (pool.filled and _huge(pool.address) == size) and time.monotonic() < end:
        places = rng.integers(0, size // 8, 1000)
        words[places], written[places] = places + 1, True
    assert np.array_equal(np.flatnonzero(words), np.flatnonzero(written))
    assert np.array_equal(words[written], np.flatnonzero(written) + 1)
    del words
    pool.close()


@needed
def test_an_array_that_was_written_before_it_is_registered_gets_huge_pages() -> None:
    held = empty(8 * MIB, np.uint8)
    held[:] = 7
    transport = ShmTransport(TransportOptions())
    address = held.ctypes.data
    assert address % HUGE == 0
    part = transport.register(address, held.nbytes, Placement.HOST)
    until(lambda: _huge(address) == held.nbytes)
    assert (held == 7).all()
    transport.release(part)
    transport.close()


@needed
@pytest.mark.parametrize("begin", [0, 6 * MIB, 7 * MIB])
def test_a_part_is_made_and_what_is_left_is_noted_by_its_place(begin: int) -> None:
    size, used = 24 * MIB, 14 * MIB
    with _file(size) as (fd, address):
        os.pwrite(fd, b"used", used)
        left = bytearray(size // HUGE)
        how, _ = _native.huge_make(address + begin, 13 * MIB, fd, begin, left, GO_ON)
        part = range(-(-begin // HUGE), (begin + 13 * MIB) // HUGE)
        noted = {page for page, is_left in enumerate(left) if is_left}  # more, on a busy machine
        assert {used // HUGE} & set(part) <= noted <= set(part)
        assert _huge(address) == HUGE * (len(part) - len(noted))
        assert how == _native.HUGE_MADE


@pytest.mark.parametrize(("left", "stop"), [(3, 8), (4, 7)])
def test_what_is_too_small_for_the_notes_is_refused(left: int, stop: int) -> None:
    with _file(8 * MIB) as (fd, address):
        with pytest.raises(ValueError, match="too small"):
            _native.huge_make(address, 8 * MIB, fd, 0, bytearray(left), bytearray(stop))
        with pytest.raises(ValueError, match="too small"):
            _native.huge_merge(address, bytearray(4), bytearray(7))


def test_care_is_taken_from_the_first_time_on_that_it_took_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    careful: list[bool] = []

    def answer(*arguments: Any) -> tuple[int, bool]:
        careful.append(arguments[-1])
        return _native.HUGE_SHORT, len(careful) > 1

    monkeypatch.setattr(_native, "huge_make", answer)
    monkeypatch.setattr(_native, "populate", lambda *_arguments: None)
    monkeypatch.setattr(_native, "huge_merge", lambda *arguments: careful.append(arguments[-1]))
    maker = memory.Maker(0, 8 * MIB, 1, 7, True)
    for _ in range(2):
        maker.make(0, 8 * MIB, STOP)
    maker.improve(STOP)
    assert careful == [False, False, True]


def test_too_little_memory_is_asked_for_again_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = [_native.HUGE_SHORT, _native.HUGE_SHORT, _native.HUGE_MADE, *[_native.HUGE_SHORT] * 9]
    made: list[int] = []
    merged: list[int] = []

    def answer(
        _address: int, _size: int, _file: int, begin: int, *_rest: object
    ) -> tuple[int, bool]:
        made.append(begin)
        return answers[len(made) - 1], False

    monkeypatch.setattr(_native, "huge_make", answer)
    monkeypatch.setattr(_native, "populate", lambda *_args: None)
    monkeypatch.setattr(_native, "huge_merge", lambda address, *_rest: merged.append(address))
    maker = memory.Maker(0, 20 * HUGE, 1, -1, huge=True)
    for part in range(10):
        maker.make(part * HUGE, HUGE, GO_ON)
    maker.improve(GO_ON)
    assert made == [part * HUGE for part in range(6)]
    assert not merged


@needed
def test_they_end_early_once_that_is_said() -> None:
    with _file(32 * MIB) as (fd, address):
        left = bytearray(16)
        assert _native.huge_make(address, 32 * MIB, fd, 0, left, STOP)[0] == _native.HUGE_MADE
        assert os.fstat(fd).st_blocks == 0
        _native.populate(address, 32 * MIB, 1, fd, 0)
        _native.huge_merge(address, bytearray(b"\1" * 16), STOP)
        assert _huge(address) == 0


def test_a_mapping_that_is_to_have_none_gets_none() -> None:
    """As where the kernel knows no such call: nobody tries again."""
    with _file(8 * MIB, huge=False) as (fd, address):
        assert _make(fd, address, 8 * MIB) == _native.HUGE_REFUSED
        _native.populate(address, 8 * MIB, 1, fd, 0)
        _native.huge_merge(address, bytearray(b"\1" * 4), GO_ON)
        assert _huge(address) == 0


def test_parts_that_do_not_lie_as_in_the_file_are_left_alone() -> None:
    with _file(8 * MIB) as (fd, address):
        assert _make(fd, address + 4096, 7 * MIB) == _native.HUGE_REFUSED
        assert os.fstat(fd).st_blocks == 0


@seccomp.needed
@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOMEM, errno.EPERM, errno.EBUSY])
def test_pools_get_small_pages_where_the_kernel_has_no_huge_ones(error: int) -> None:
    def look() -> object:
        size = 64 * MIB
        seccomp.install(["madvise"], error)
        pool = _pool(size)
        return pool.filled, _huge(pool.address), os.fstat(pool.fd).st_blocks * 512 == size

    if pages.transparent():
        pytest.skip("this machine has huge pages for shared memory")  # then madvise makes them all
    assert in_child(look) == "(True, 0, True)"


def test_a_pool_that_is_released_meanwhile_goes_once_that_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def wait(*_args: Any) -> None:
        begun.set()
        assert may_end.wait(60)

    monkeypatch.setattr(memory.Maker, "improve", wait)
    pool = _pool(4 * MIB, wait=False)
    assert begun.wait(60)
    fd, mapped = pool.fd, f"{pool.address:x}-"
    pool.close()
    del pool
    assert is_open(fd)
    assert mapped in Path("/proc/self/maps").read_text()
    may_end.set()
    until(lambda: not is_open(fd))
    until(lambda: mapped not in Path("/proc/self/maps").read_text())


def test_an_array_of_any_size_lies_where_it_can_have_them() -> None:
    for size in (1, mmap.PAGESIZE, HUGE - 1, HUGE, 3 * HUGE + 1):
        held = empty(size, np.uint8)
        assert held.ctypes.data % (HUGE if size >= HUGE else mmap.PAGESIZE) == 0


@needed
def test_doctor_tells_what_pools_are_made_of() -> None:
    expected = "which the machine offers" if pages.transparent() else "made on demand"
    assert ShmTransport.measure()["pages"] == f"huge ones, {expected}"


@seccomp.needed
def test_doctor_tells_how_to_get_them() -> None:
    def look() -> object:
        seccomp.install(["madvise"], errno.EINVAL)
        return ShmTransport.measure()["pages"]

    if pages.transparent():
        pytest.skip("this machine has huge pages for shared memory")
    assert "small ones: " in in_child(look)
    assert "shmem_enabled" in in_child(look)

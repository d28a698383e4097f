"""Pools of the shm transport: their pages, huge pages, options."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import threading
from array import array
from pathlib import Path
from typing import Any, cast

import pytest
from datadist_shm import ShmTransport, _native, memory, options, pages
from datadist_shm.memory import PoolRegion

from datadist.base import cgroups, memory_room
from datadist.base.memory_file import create_sealed
from datadist.base.memory_map import current_mappings
from datadist.transport import (
    Placement,
    RegistrationError,
    TransportError,
    TransportOptions,
)
from tests import tasks
from tests.privileges import in_child
from tests.resident import resident
from tests.waiting import until

MIB = 1 << 20
PAGE = mmap.PAGESIZE


def _transport(**extra: str) -> ShmTransport:
    return ShmTransport(TransportOptions(extra=extra))


def test_a_pool_can_be_used_at_once_and_is_filled_in_the_background() -> None:
    transport = _transport()
    region = transport.allocate(96 * MIB, Placement.HOST)
    assert isinstance(region, PoolRegion)
    ctypes.memset(region.address + 90 * MIB, 5, 100)
    region.wait_filled(30)
    assert region.filled
    assert os.fstat(region.fd).st_blocks * 512 == 96 * MIB
    assert (
        resident(region.address) > 95 * MIB
    )  # the kernel may take single ones out of the page table
    assert ctypes.string_at(region.address + 90 * MIB, 101) == b"\5" * 100 + b"\0"
    transport.release(region)


def test_without_population_no_page_is_made() -> None:
    transport = _transport(populate="0")
    region = transport.allocate(96 * MIB, Placement.HOST)
    assert isinstance(region, PoolRegion)
    region.wait_filled(0)
    assert not region.filled
    assert resident(region.address) == 0
    transport.release(region)


def _open_memory() -> set[int]:
    """Files of shared memory that are open, by inode; others go with what earlier tests left."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("/memfd:"):
                found.add(os.stat(f"/proc/self/fd/{name}").st_ino)
    return found


def test_release_ends_the_filling() -> None:
    transport = _transport()
    before, native = {thread.name for thread in threading.enumerate()}, tasks.count()
    earlier = _open_memory()
    region = transport.allocate(1024 * MIB, Placement.HOST)
    assert _open_memory() - earlier
    transport.release(region)  # at once: see test_shm_pages.py
    until(lambda: {thread.name for thread in threading.enumerate()} <= before)
    assert tasks.falls_to(native)
    until(lambda: _open_memory() <= earlier)


def test_more_than_there_is_is_refused_before_pages_are_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    info = tmp_path / "meminfo"
    info.write_text("MemTotal: 99 kB\nMemAvailable: 512 kB\nSwapFree: 256 kB\n")
    monkeypatch.setattr(memory_room, "MEMINFO", info)
    monkeypatch.setattr(memory_room, "PROC", tmp_path)
    transport = _transport()
    with pytest.raises(MemoryError, match="786432 bytes are available"):
        transport.allocate(MIB, Placement.HOST)
    transport.release(transport.allocate(MIB // 2, Placement.HOST))
    lazy = _transport(populate="0")
    lazy.release(lazy.allocate(MIB, Placement.HOST))


@pytest.mark.parametrize("by_file", [True, False])
@pytest.mark.parametrize("threads", [1, 4])
def test_pages_that_cannot_be_had_are_an_error(threads: int, by_file: bool) -> None:
    fd = create_sealed("short", 9 * MIB)
    address = _native.map(fd, 18 * MIB, True, False)
    file = fd if by_file else -1
    try:
        _native.populate(address, 9 * MIB, threads, file, 0)
        with pytest.raises(OSError, match="Cannot allocate memory") as error:
            _native.populate(address, 18 * MIB, threads, file, 0)
        assert error.value.errno == errno.ENOMEM
    finally:
        _native.unmap(address, 18 * MIB)
        os.close(fd)


@pytest.mark.parametrize("by_file", [True, False])
@pytest.mark.parametrize("threads", [1, 4])
def test_a_part_is_populated_and_keeps_what_was_written(threads: int, by_file: bool) -> None:
    begin, end, size = 3 * MIB + PAGE, 20 * MIB - PAGE, 21 * MIB
    fd = create_sealed("part", size)
    address = _native.map(fd, size, True, False)
    try:
        os.pwrite(fd, b"written", begin + MIB + 5)
        _native.populate(address + begin, end - begin, threads, fd if by_file else -1, begin)
        assert os.fstat(fd).st_blocks * 512 == end - begin
        assert os.pread(fd, end - begin, begin).strip(b"\0") == b"written"
        assert os.lseek(fd, 0, os.SEEK_DATA) == begin
    finally:
        _native.unmap(address, size)
        os.close(fd)


def test_populating_ends_once_it_is_told_to() -> None:
    fd = create_sealed("stopped", 64 * MIB)
    address = _native.map(fd, 64 * MIB, True, False)
    try:
        _native.populate(address, 64 * MIB, 2, fd, 0, array("q", [1]))
        assert os.fstat(fd).st_blocks == 0
    finally:
        _native.unmap(address, 64 * MIB)
        os.close(fd)


def test_a_file_has_all_pages_of_a_part_before_one_is_touched() -> None:
    """No thread of low priority makes them: the kernel lets nobody seal the file meanwhile."""
    size = 128 * MIB
    fd = create_sealed("first", size)
    address = _native.map(fd, size, True, False)
    arguments = address, size, 2, fd, 0, array("q", [0])
    thread = threading.Thread(target=_native.populate, args=arguments)
    thread.start()
    try:
        while resident(address) == 0:
            pass
        assert os.fstat(fd).st_blocks * 512 == size
    finally:
        thread.join()
        _native.unmap(address, size)
        os.close(fd)


def _nice_values() -> list[int]:
    """Of all threads of this process, as far as they still live."""
    values = []
    for stat in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            values.append(int(stat.read_text().rpartition(")")[2].split()[16]))
    return values


@pytest.mark.skipif(
    "libtsan" in os.environ.get("LD_PRELOAD", ""),
    reason="a sanitizer ends a process that starts threads after a fork",
)
@pytest.mark.parametrize("own", [0, 15])
def test_the_threads_that_populate_go_last(own: int) -> None:
    def look() -> object:
        os.nice(max(0, own - os.nice(0)))
        region = _transport(huge_pages="0").allocate(128 * MIB, Placement.HOST)
        assert isinstance(region, PoolRegion)
        seen = set(_nice_values())
        while not region.filled:
            seen.update(_nice_values())
        return sorted(seen) == sorted({os.nice(0), max(10, os.nice(0))})

    assert in_child(look) == "True"


def test_a_child_that_is_forked_while_a_pool_is_populated_does_not_keep_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, may_go_on = threading.Event(), threading.Event()

    def wait(*_args: Any) -> None:
        begun.set()
        assert may_go_on.wait(60)

    def look() -> object:
        return f"{address:x}-" in Path("/proc/self/maps").read_text()

    monkeypatch.setattr(memory.Maker, "make", wait)
    transport = _transport()
    region = transport.allocate(MIB, Placement.HOST)
    address = region.address
    try:
        assert begun.wait(60)
        assert in_child(look) == "False"
        assert look()
    finally:
        may_go_on.set()
        transport.release(region)


def test_a_failure_in_the_background_is_told_to_who_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(memory.Maker, "make", fail)
    transport = _transport()
    region = transport.allocate(MIB, Placement.HOST)
    assert isinstance(region, PoolRegion)
    with pytest.raises(RegistrationError, match="Cannot allocate memory"):
        region.wait_filled(60)
    assert not region.filled
    transport.release(region)


@pytest.mark.parametrize(
    ("general", "sized", "offered"),
    [
        ("always within_size advise [never] deny force", "always [inherit] advise never", False),
        ("always within_size [advise] never deny force", "always [inherit] advise never", True),
        ("always within_size advise [never] deny force", "always inherit [advise] never", True),
        ("always within_size [advise] never deny force", "always inherit advise [never]", False),
        ("always within_size advise never [deny] force", "[always] inherit advise never", False),
        ("[always] within_size advise never deny force", None, True),
        (None, None, False),
    ],
)
def test_whether_huge_pages_are_offered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    general: str | None, sized: str | None, offered: bool,
) -> None:  # fmt: skip
    (tmp_path / "hugepages-2048kB").mkdir()
    if general is not None:
        (tmp_path / "shmem_enabled").write_text(general + "\n")
    if sized is not None:
        (tmp_path / "hugepages-2048kB" / "shmem_enabled").write_text(sized + "\n")
    monkeypatch.setattr(pages, "TRANSPARENT", tmp_path)
    assert pages.transparent() is offered


def test_huge_pages_that_are_asked_for_and_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "transparent", lambda: False)
    monkeypatch.setattr(pages, "reserved", lambda: 0)
    transport = _transport(huge_pages="1")
    with pytest.raises(RegistrationError, match=r"shmem_enabled, or reserve 2 pages .*0 are free"):
        transport.allocate(3 * MIB, Placement.HOST)
    monkeypatch.setattr(pages, "reserved", lambda: 4 * MIB)
    assert pages.choose("1", 3 * MIB) == ("reserved", 4 * MIB)
    assert pages.choose("auto", 3 * MIB) == ("small", 3 * MIB)
    monkeypatch.setattr(pages, "transparent", lambda: True)
    assert pages.choose("auto", 3 * MIB) == ("transparent", 3 * MIB)
    assert pages.choose("0", 3 * MIB) == ("small", 3 * MIB)


def test_huge_pages_of_this_machine() -> None:
    if not pages.transparent() and pages.reserved() < 4 * MIB:
        pytest.skip("this machine has no huge pages for shared memory")
    transport = _transport(huge_pages="1")
    region = transport.allocate(3 * MIB, Placement.HOST)
    assert isinstance(region, PoolRegion)
    region.wait_filled(60)
    assert ctypes.string_at(region.address, 16) == bytes(16)
    if region.pages == "reserved":
        assert region.size == 4 * MIB
    else:
        assert region.size == 3 * MIB
        assert resident(region.address, "ShmemPmdMapped") == 2 * MIB
    transport.release(region)


def test_options(monkeypatch: pytest.MonkeyPatch) -> None:
    cpus = cgroups.cpus()
    parsed = options.Options.parse({})
    assert parsed.threads == min(cpus, options.DEFAULT_MAX_THREADS)
    assert parsed.copy_threads == -min(cpus, _native.MAX_THREADS), "as many as tuning finds useful"
    assert (parsed.kernel, parsed.kernel_number) == ("auto", _native.AUTO)
    assert options.Options.parse({"threads": "64"}).threads == min(cpus, 64)
    assert options.Options.parse({"threads": "1"}).threads == 1
    assert options.Options.parse({"threads": "1"}).copy_threads == 1
    assert options.Options.parse({"kernel": "memcpy"}).kernel_number == _native.KERNELS["memcpy"]
    for name, value in (
        ("threads", "0"), ("threads", "65"), ("threads", "-1"), ("threads", "x"),
        ("huge_pages", "yes"), ("kernel", "fast"), ("ptracer", "2"),
    ):  # fmt: skip
        with pytest.raises(TransportError, match=value):
            options.Options.parse({name: value})


def test_options_in_force_are_described() -> None:
    shown = _transport(threads="1", kernel="memcpy", populate="0").describe()
    assert shown == {
        "populate": False, "overcommit": False, "ptracer": True, "threads": 1, "huge_pages": "auto",
        "kernel": "memcpy",
    }  # fmt: skip


@pytest.mark.parametrize("writable", [False, True])
def test_several_threads_may_open_the_first_links(
    monkeypatch: pytest.MonkeyPatch, writable: bool
) -> None:
    transport = _transport()
    region = transport.allocate(MIB, Placement.HOST)
    assert isinstance(region, PoolRegion)
    both_have_looked, plain = threading.Barrier(2), fcntl.fcntl
    failed: list[Exception] = []

    def slow(fd: int, command: int, *rest: Any) -> int:
        found = int(plain(fd, command, *rest))
        if command == fcntl.F_GET_SEALS:
            with contextlib.suppress(
                threading.BrokenBarrierError
            ):  # one at a time, as it should be
                both_have_looked.wait(0.2)
        return found

    def seal() -> None:
        try:
            memory.seal(region, writable)
        except Exception as error:
            failed.append(error)

    monkeypatch.setattr(fcntl, "fcntl", slow)
    threads = [threading.Thread(target=seal) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []
    with pytest.raises(RegistrationError, match="another access"):
        memory.seal(region, not writable)
    transport.release(region)


@pytest.mark.parametrize(
    ("access", "mode"), [(mmap.PROT_READ, "r-"), (mmap.PROT_WRITE, "-w"), (0, "--")]
)
def test_memory_that_cannot_be_read_and_written_is_refused(access: int, mode: str) -> None:
    """In part, too: the page in the middle decides."""
    page = mmap.PAGESIZE
    held = mmap.mmap(-1, 3 * page)
    first = ctypes.addressof(ctypes.c_char.from_buffer(held))
    protect = ctypes.CDLL(None).mprotect
    middle = ctypes.c_void_p(first + page), ctypes.c_size_t(page)
    assert protect(*middle, access) == 0
    try:
        memory.check_user_memory(current_mappings(), first, page)
        memory.check_user_memory(current_mappings(), first + 2 * page, page)
        for begin, size in ((0, page + 1), (0, 3 * page), (page, page), (2 * page - 1, 2)):
            with pytest.raises(
                RegistrationError, match=f"mapped '{mode}[^']*', it must be readable"
            ):
                memory.check_user_memory(current_mappings(), first + begin, size)
    finally:
        assert protect(*middle, mmap.PROT_READ | mmap.PROT_WRITE) == 0
    memory.check_user_memory(current_mappings(), first, 3 * page)


class _Mapped:
    """Stands for a mapping."""


def test_a_peers_memory_is_mapped_once_and_forgotten_after_its_last_user() -> None:
    mappings, key = memory.PeerMappings(), ("peer", 1, False)
    made: list[int] = []

    def fail() -> memory.PeerMapping:
        raise OSError(errno.ENOMEM, "no memory")

    def make() -> memory.PeerMapping:
        mapping = cast("memory.PeerMapping", _Mapped())
        made.append(id(mapping))
        return mapping

    with pytest.raises(OSError, match="no memory"):
        mappings.take(key, fail)
    assert len(mappings) == 0
    for times in (1, 2):
        users = [mappings.take(key, make) for _ in range(3)]
        other = mappings.take(("peer", 2, False), make)
        assert {id(user) for user in users} == {made[-2]}
        assert (len(made), len(mappings)) == (2 * times, 2)
        users.clear()
        assert len(mappings) == 1
        del other
        assert len(mappings) == 0


def test_a_mapping_of_pages_as_large_as_itself_is_undone() -> None:
    """Which a peer may offer, and which cannot be unmapped in parts."""
    size, huge_1g = 1 << 30, 30 << 26
    try:
        fd = os.memfd_create("datadist-gigantic", os.MFD_CLOEXEC | os.MFD_HUGETLB | huge_1g)
    except OSError:
        pytest.skip("this machine has no huge pages for shared memory")
    try:
        os.ftruncate(fd, size)
        mapping = memory.PeerMapping(
            fd, size, False, huge=True, file=memory.PeerFile((0, 0), False)
        )
        address = f"{mapping.address:x}-"
        assert address in Path("/proc/self/maps").read_text()
        del mapping
        assert address not in Path("/proc/self/maps").read_text()
    finally:
        os.close(fd)

"""Memory of this process that other processes can map: what `datadist.empty` gives.

It does not belong to an engine. A transport whose peers map memory finds it by its address
(:func:`find`) when a part of it is registered; to others it is memory as any other.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref

from datadist.base.memory_file import create_sealed
from datadist.base.memory_room import least_room, overhead, pool_name

__all__ = ["SharedMemory", "find"]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)  # fmt: skip
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
FAILED = ctypes.c_void_p(-1).value
HUGE_PAGES = 14
"""MADV_HUGEPAGE: a wish, no more."""
HUGE = 2 << 20
TRIES = 3
PROT_NONE = 0
MAP_NORESERVE = 0x4000
"""asm-generic/mman.h, as PROT_NONE; not in the module of every Python."""

_all: dict[int, weakref.ref[SharedMemory]] = {}
"""By address; changed in one step each."""


class SharedMemory:
    """Zeroed memory in a file of its own; unmapped and closed with the last reference.

    Raises ``MemoryError`` where there is not enough, ``OSError`` for what else the system refuses.
    """

    def __init__(self, size: int) -> None:
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.sealing = threading.Lock()
        """Held while seals of the file are looked at and added."""
        self._held: list[int] = []
        """Descriptor and address, noted in C: an exception of a signal handler loses none."""
        weakref.finalize(self, _free, self._held, self.size).atexit = False
        self._held.extend(map(_create, (self.size,)))
        self._held.extend(map(_map, self._held[:1], (self.size,)))
        _all[self.address] = weakref.ref(self)

    @property
    def fd(self) -> int:
        """The descriptor of the file, which stays ours; -1 in a forked child."""
        return self._held[0]

    @property
    def address(self) -> int:
        """Where it is mapped."""
        return self._held[1]

    def leave(self) -> None:
        """In a forked child: the file goes with the parent, but for what arrays here still map."""
        fd, self._held[0] = self._held[0], -1
        os.close(fd)


def find(address: int, size: int) -> SharedMemory | None:
    """What holds all of a range, if anything does."""
    for begin, reference in list(_all.items()):
        shared = reference() if begin <= address else None
        if shared is not None and address + size <= begin + shared.size:
            return shared
    return None


def _create(size: int) -> int:
    fd = create_sealed(pool_name(), size)
    try:
        room, need = least_room(os.fstat(fd).st_ino), size + overhead(size)
        if room is not None and need > room.size:
            raise MemoryError(f"cannot have {size} bytes of shared memory: {room}")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _map(fd: int, size: int) -> int:
    writable = mmap.PROT_READ | mmap.PROT_WRITE
    for left in reversed(range(TRIES)):
        place = _huge_place(size) if left else None
        address = _libc.mmap(place, size, writable, mmap.MAP_SHARED, fd, 0)
        if address in (FAILED, None):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        if place in (None, address):
            break
        _libc.munmap(address, size)  # another thread was faster
    _libc.madvise(address, size, HUGE_PAGES)
    return int(address)


def _huge_place(size: int) -> int | None:
    """Where huge pages can be mapped as such, if nobody else maps there first; None for anywhere."""
    if size < HUGE:
        return None
    kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    place = _libc.mmap(None, size + HUGE, PROT_NONE, kind, -1, 0)
    if place in (FAILED, None):
        return None
    _libc.munmap(place, size + HUGE)
    return -(-int(place) // HUGE) * HUGE


def _free(held: list[int], size: int) -> None:
    if len(held) == 2:
        _all.pop(held[1], None)
        _libc.munmap(held[1], size)
    if held and held[0] >= 0:
        os.close(held[0])


def _leave_in_child() -> None:
    shared = [reference() for reference in _all.values()]
    _all.clear()
    for each in shared:
        if each is not None:
            each.leave()


os.register_at_fork(after_in_child=_leave_in_child)

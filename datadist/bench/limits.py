"""The limits of the machine: reference copies that are measured in the same run as the transfers.

Each reference copy moves as many bytes as the transfer that it is compared with, with as many
threads.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from datadist.base import cgroups
from datadist.base.memory_room import least_room
from datadist.bench.measured_engine import SECONDS, BenchError
from datadist.bench.shapes import Shape
from datadist.transport import Placement, Transport

Int64Array = NDArray[np.int64]
Copy = Callable[[Int64Array, Int64Array, Int64Array], None]
NATIVE_COPY, PROCESS_VM = "native copy", "process_vm_readv"
SOURCE_PART = 3
"""One of so many parts of the memory that can be had is the most for a substitute of the peer's cache."""
MEMCPY_BYTES = 256 << 20
PIECE = 1 << 20
"""Larger ranges are split for process_vm_readv, so that several threads can share them."""
CALL_RANGES = 128
LISTS_EACH = 1 << 20
"""More lists than any reference copy, or the transfers, use."""


def threads_of_machine() -> int:
    """Threads that limits use unless told otherwise: the CPUs of this process, up to 4."""
    return min(4, cgroups.cpus())


class Limits(Protocol):
    """Limits of one workload, each measured beside the transfers that it is compared with."""

    @property
    def names(self) -> Sequence[str]:
        """The limits that can be measured here."""

    @property
    def applicable(self) -> Sequence[str]:
        """Those that move what the transfers move; the fastest one is the limit of these."""

    @property
    def compared(self) -> str:
        """The one with which curves are compared."""

    def measure(self, name: str, number: int) -> float:
        """Seconds that this limit needs for as many bytes as transfer ``number`` moves."""

    def close(self) -> None:
        """Give back what measuring needed."""


class HostLimits:
    """The limits of one workload; ``mine`` and ``theirs`` are addresses of the caches' tensors."""

    def __init__(
        self, transport: Transport, shape: Shape, mine: list[int], pid: int, theirs: list[int],
        threads: int, *, private: bool,
    ) -> None:  # fmt: skip
        """``private``: the caches are memory that other processes cannot map."""
        self._transport = transport
        self._shape = shape
        self._mine, self._theirs = (np.array(bases, np.int64) for bases in (mine, theirs))
        self._pid = pid
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self._from, self._to = (
            np.ones(min(shape.nbytes, MEMCPY_BYTES), np.uint8) for _ in range(2)
        )
        copies: dict[str, Copy] = {NATIVE_COPY: transport.copy}
        for name, copy in transport.copies().items():
            copies[f"{name} kernel"] = copy
        self._ways: dict[str, Callable[[int], float]] = {
            "memcpy": self._memcpy,
            **{name: partial(self._native_copy, copy) for name, copy in copies.items()},
            PROCESS_VM: self._process_vm,
        }
        try:
            self.measure(PROCESS_VM, 0)
        except BenchError:
            del self._ways[PROCESS_VM]
        can_map = not private or PROCESS_VM not in self._ways
        self.applicable = self.names if can_map else [PROCESS_VM]
        self._source = transport.allocate(_source_bytes(shape), _addressable(transport))
        self._source.wait_filled(SECONDS)  # else it has other pages than pools
        ctypes.memset(self._source.address, 1, self._source.size)

    compared = NATIVE_COPY

    @property
    def names(self) -> list[str]:
        """The limits that can be measured here."""
        return list(self._ways)

    def close(self) -> None:
        """End the threads, and give the memory back."""
        self._pool.shutdown()
        self._transport.release(self._source)

    def measure(self, name: str, number: int) -> float:
        """Seconds that this reference copy needs for as many bytes as transfer ``number`` moves.

        Its lists are its own: what another one has just read would be in the caches.
        """
        place = list(self._ways).index(name)
        return self._ways[name](number + (1 + place) * LISTS_EACH)

    def _memcpy(self, _number: int) -> float:
        """The C library's memmove of one range, split among threads."""
        nbytes = self._to.nbytes
        part = -(-nbytes // self._threads)
        dst, src = self._to.ctypes.data, self._from.ctypes.data

        def move(offset: int) -> None:
            ctypes.memmove(dst + offset, src + offset, min(part, nbytes - offset))

        return self._timed(move, range(0, nbytes, part)) * self._shape.nbytes / nbytes

    def _native_copy(self, copy: Copy, number: int) -> float:
        """A local copy of as many blocks, at random places of each tensor as those of the transfer."""
        shape = self._shape
        dst = self._blocks(self._mine, shape.lists(number)[1])
        slots = self._source.size // shape.block_bytes // shape.tensors
        chosen = np.resize(np.random.default_rng(number).permutation(slots), shape.count)
        tensors = np.arange(shape.tensors) * slots
        src = self._source.address + np.add.outer(tensors, chosen).ravel() * shape.block_bytes
        length = np.full(len(dst), shape.block_bytes, np.int64)
        began = time.perf_counter()
        copy(dst, src, length)
        return time.perf_counter() - began

    def _process_vm(self, number: int) -> float:
        """process_vm_readv of the same bytes, with calls distributed among threads."""
        source, target = self._shape.lists(number)
        size = min(PIECE, self._shape.block_bytes)
        calls = _calls(
            _pieces(self._blocks(self._mine, target), self._shape.block_bytes),
            _pieces(self._blocks(self._theirs, source), self._shape.block_bytes),
            size,
        )
        readv = ctypes.CDLL(None, use_errno=True).process_vm_readv
        readv.restype = ctypes.c_ssize_t

        def move(first: int) -> None:
            for mine, theirs in calls[first :: self._threads]:
                if readv(self._pid, mine, len(mine), theirs, len(theirs), 0) != size * len(mine):
                    reason = os.strerror(ctypes.get_errno())
                    raise BenchError(f"process_vm_readv of process {self._pid}: {reason}")

        return self._timed(move, range(self._threads))

    def _blocks(self, bases: Int64Array, blocks: list[int]) -> Int64Array:
        offsets = np.array(blocks, np.int64) * self._shape.block_bytes
        return np.add.outer(bases, offsets).ravel()

    def _timed(self, move: Callable[[int], None], parts: range) -> float:
        """Seconds of all parts, the first one in this thread."""
        began = time.perf_counter()
        others = [self._pool.submit(move, part) for part in parts[1:]]
        move(parts[0])
        for other in others:
            other.result()
        return time.perf_counter() - began


def _addressable(transport: Transport) -> Placement:
    """A placement of memory that both the transport and the reference copies can use."""
    capabilities = transport.capabilities
    usable = capabilities.host_addressable & capabilities.placements
    if not usable:
        raise BenchError(
            "the processor cannot address memory of this transport: no copy is a limit"
        )
    return min(usable)


def _source_bytes(shape: Shape) -> int:
    """As many as the peer's cache has, if there is room: pages of a smaller one are found faster."""
    room = least_room()
    most = shape.cache_bytes if room is None else room.size // SOURCE_PART
    return max(shape.nbytes, min(shape.cache_bytes, most))


class _Range(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


Ranges: TypeAlias = "ctypes.Array[_Range]"


def _pieces(addresses: Int64Array, size: int) -> Int64Array:
    """Addresses of pieces of at most :data:`PIECE` bytes; larger sizes are multiples of it."""
    return np.add.outer(addresses, np.arange(0, size, PIECE)).ravel()


def _calls(mine: Int64Array, theirs: Int64Array, size: int) -> list[tuple[Ranges, Ranges]]:
    """The arguments of each call."""
    calls = []
    for start in range(0, len(mine), CALL_RANGES):
        part = slice(start, start + CALL_RANGES)
        both = [[_Range(int(a), size) for a in side[part]] for side in (mine, theirs)]
        local, remote = ((_Range * len(ranges))(*ranges) for ranges in both)
        calls.append((local, remote))
    return calls

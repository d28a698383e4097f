"""Memory of the nixl transport: own anonymous mappings, ranges of the user, and looking them up."""

from __future__ import annotations

import ctypes
import mmap
from bisect import bisect_right
from collections.abc import Iterable
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from datadist.transport import Placement, Region, RegistrationError
from datadist_nixl.library import HOST, Kind

Vector = NDArray[np.int64]
T = TypeVar("T")

MS_ASYNC = 1


class NixlRegion(Region):
    """A range of memory, with its type and device in NIXL's words."""

    __slots__ = ("kind",)

    def __init__(
        self, address: int, size: int, placement: Placement, kind: Kind = HOST,
        keeper: object | None = None,
    ) -> None:  # fmt: skip
        super().__init__(address, size, placement, keeper)
        self.kind = kind


def allocate(size: int, placement: Placement = Placement.HOST) -> NixlRegion:
    """Zeroed anonymous memory of the host. Raises ``MemoryError``."""
    try:
        mapping = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise MemoryError(f"{size} bytes: {error}") from error
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    return NixlRegion(address, size, placement, HOST, mapping)


def region(address: int, size: int, placement: Placement = Placement.HOST) -> NixlRegion:
    """Any memory of the process; msync tells whether it is mapped. Raises RegistrationError."""
    first = address & -mmap.PAGESIZE
    area = ctypes.c_void_p(first), ctypes.c_size_t(address + size - first)
    if ctypes.CDLL(None).msync(*area, MS_ASYNC):
        raise RegistrationError(f"the {size} bytes at {address:#x} are not mapped here")
    return NixlRegion(address, size, placement)


class Outside(Exception):
    """Segment ``index`` lies in no range."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


class Ranges(Generic[T]):
    """Ranges of addresses with a value each, looked up one by one or by vectors; immutable."""

    def __init__(self, ranges: Iterable[tuple[int, int, T]]) -> None:
        """``ranges``: address, size in bytes, value; they do not overlap."""
        rows = sorted(ranges, key=lambda row: row[0])
        self.values = [value for _, _, value in rows]
        self._firsts = [address for address, _, _ in rows]
        self._lasts = [address + size for address, size, _ in rows]
        self._begins = np.array(self._firsts, np.int64)
        self._ends = np.array(self._lasts, np.int64)

    def find(self, address: int, length: int) -> T:
        """The value of the range that holds a segment. Raises :class:`Outside`."""
        place = bisect_right(self._firsts, address) - 1
        if place < 0 or address + length > self._lasts[place]:
            raise Outside(0)
        return self.values[place]

    def places(self, address: Vector, length: Vector) -> NDArray[np.intp]:
        """The index in :attr:`values` for every segment.

        Raises :class:`Outside` with the number of the first segment that no range holds.
        """
        if not self.values:
            raise Outside(0)
        place = np.searchsorted(self._begins, address, side="right") - 1
        # Compared as a difference: the sum of an invalid address and a length could overflow.
        inside = (place >= 0) & (length > 0) & (length <= self._ends[place] - address)
        if not inside.all():
            raise Outside(int(np.argmin(inside)))
        return place

    def some(self, places: NDArray[np.intp]) -> list[T]:
        """The values at some indices, each once."""
        first = int(places[0])
        if len(self.values) == 1 or (places == first).all():
            return [self.values[first]]
        return [self.values[i] for i in np.unique(places)]

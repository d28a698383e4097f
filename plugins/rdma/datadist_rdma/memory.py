"""Memory of the rdma transport: own anonymous mappings, registered ranges of the user, their keys."""

from __future__ import annotations

import ctypes
import mmap
from bisect import bisect_right
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datadist.transport import Placement, Region, RegistrationError
from datadist_rdma.device import Device

Vector = NDArray[np.int64]


class RdmaRegion(Region):
    """A range of memory, with one registration per device that it is used with."""

    __slots__ = ("_registered",)

    def __init__(
        self, address: int, size: int, placement: Placement, keeper: object | None = None
    ) -> None:
        super().__init__(address, size, placement, keeper)
        self._registered: dict[Device, Any] = {}

    def register(self, device: Device) -> None:
        """Make the memory known to a device, once. Raises RegistrationError."""
        if device not in self._registered:
            self._registered[device] = device.register(self.address, self.size)

    def keys(self, device: Device) -> tuple[int, int]:
        """Local and remote key on a device that it was registered with."""
        region = self._registered[device].contents
        return region.lkey, region.rkey

    def deregister(self, device: Device) -> None:
        """Undo :meth:`register`. Raises RegistrationError."""
        if device in self._registered:
            device.deregister(self._registered[device])
            del self._registered[device]

    def close(self) -> None:
        """Deregister everywhere; own memory is unmapped with its last reference."""
        for device in list(self._registered):
            self.deregister(device)
        self.keeper = None


def allocate(size: int, placement: Placement) -> RdmaRegion:
    """Zeroed anonymous memory. Raises ``MemoryError`` or :class:`RegistrationError`."""
    try:
        mapping = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OverflowError as error:
        raise MemoryError(f"{size} bytes: {error}") from None
    except OSError as error:
        if error.errno == 12:  # ENOMEM
            raise MemoryError(f"{size} bytes: {error.strerror}") from None
        raise RegistrationError(f"cannot get {size} bytes of memory: {error}") from None
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    return RdmaRegion(address, size, placement, keeper=mapping)


class Ranges:
    """Ranges of addresses with a key each, looked up by vectors; immutable."""

    def __init__(self, ranges: Iterable[tuple[int, int, int]]) -> None:
        """``ranges``: address, size in bytes, key; they do not overlap."""
        table = np.array(sorted(ranges), np.int64).reshape(-1, 3)
        self._begins = table[:, 0].copy()
        self._ends = table[:, 0] + table[:, 1]
        self._keys = table[:, 2].astype(np.uint32)
        self._rows = [tuple(row) for row in table.tolist()]
        self._firsts = [row[0] for row in self._rows]

    def keys(self, address: Vector, length: Vector) -> NDArray[np.uint32]:
        """The key of every segment.

        Raises :class:`Outside` with the number of the first segment that no range holds.
        """
        if not len(self._begins):
            raise Outside(0)
        place = np.searchsorted(self._begins, address, side="right") - 1
        # Compared as a difference: the sum of an invalid address and a length could overflow.
        inside = (place >= 0) & (length <= self._ends[place] - address)
        if not inside.all():
            raise Outside(int(np.argmin(inside)))
        return self._keys[place]

    def key(self, address: int, length: int) -> int:
        """As :meth:`keys` for one segment, which is faster than with vectors."""
        place = bisect_right(self._firsts, address) - 1
        if place >= 0:
            begin, size, key = self._rows[place]
            if address + length <= begin + size:
                return int(key)
        raise Outside(0)


class Outside(Exception):
    """Segment ``index`` lies in no range."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index

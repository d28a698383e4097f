"""Segments of a transfer: checked against registered ranges, split at their borders, as items."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from typing_extensions import Buffer

Int64Array = NDArray[np.int64]
Segments = tuple[Int64Array, Int64Array, Int64Array]
"""Local addresses, remote addresses, lengths."""

ITEM_BYTES = 32


class Outside(Exception):
    """A segment is not covered on our side (``local``) or the other one, from ``address`` on."""

    def __init__(self, local: bool, address: int) -> None:
        super().__init__(local, address)
        self.local = local
        self.address = address


class Windows:
    """Ranges of memory, none of which overlap; a segment may span adjacent ones."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        """``ranges``: address and size of each."""
        found = sorted((address, address + size) for address, size in ranges)
        table = np.array(found, np.int64).reshape(len(found), 2)
        self._starts, self._ends = table[:, 0].copy(), table[:, 1].copy()

    def room_at(self, addresses: Int64Array) -> Int64Array:
        """Bytes from each address to the end of its window; 0 for addresses in none."""
        room = np.zeros(len(addresses), np.int64)
        if len(self._starts):
            place = np.searchsorted(self._starts, addresses, side="right") - 1
            inside = (place >= 0) & (addresses < self._ends[place])
            room[inside] = self._ends[place[inside]] - addresses[inside]
        return room

    def holds(self, address: int) -> bool:
        """Whether an address lies in one of them."""
        return bool(self.room_at(np.array([address], np.int64))[0])


def pieces(
    local: Buffer, remote: Buffer, length: Buffer, ours: Windows, theirs: Windows
) -> Segments:
    """The segments, each inside one window on either side.

    Raises :class:`Outside` for the first segment that is not covered.
    """
    mine, other, size = (np.frombuffer(buffer, np.int64) for buffer in (local, remote, length))
    fits = (size <= ours.room_at(mine)) & (size <= theirs.room_at(other))
    if fits.all():
        return mine, other, size
    rows = []
    for index in range(len(size)):
        rows += _split(int(mine[index]), int(other[index]), int(size[index]), ours, theirs)
    table = np.array(rows, np.int64)
    return table[:, 0].copy(), table[:, 1].copy(), table[:, 2].copy()


def _split(
    mine: int, other: int, size: int, ours: Windows, theirs: Windows
) -> list[tuple[int, int, int]]:
    rows = []
    while size:
        room = size
        for address, windows in ((mine, ours), (other, theirs)):
            here = int(windows.room_at(np.array([address], np.int64))[0])
            if not here:
                raise Outside(windows is ours, address)
            room = min(room, here)
        rows.append((mine, other, room))
        mine, other, size = mine + room, other + room, size - room
    return rows


def items(mine: Int64Array, other: Int64Array, size: Int64Array) -> NDArray[np.uint64]:
    """The items of a batch (``abi.OpDesc``), n rows of 32 bytes: the type in the last is int8, 0."""
    table = np.zeros((len(size), 4), np.uint64)
    table[:, 0], table[:, 1], table[:, 2] = mine, other, size
    return table

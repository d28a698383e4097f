"""The memory mappings of this process, as the kernel lists them; for transports that register memory."""

from __future__ import annotations

import errno
import fcntl
import struct
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from datadist.base.callers import pass_on
from datadist.base.picklable import PicklableError

__all__ = [
    "KeptMappings", "ListedMappings", "MemoryMap", "NotWritable", "QueriedMappings", "current_mappings",
]  # fmt: skip

MAPS = Path("/proc/self/maps")
QUERY = struct.Struct("=6Q56x")
"""linux/fs.h, struct procmap_query: its size, flags, the address; begin, end and flags of a mapping."""
PROCMAP_QUERY = 3 << 30 | QUERY.size << 16 | ord("f") << 8 | 17
COVERING_OR_NEXT = 0x10


class NotWritable(PicklableError):
    """A range is not readable and writable memory.

    ``address`` is the first such byte, ``mode`` its protection, or None if nothing is mapped there.
    """

    def __init__(self, address: int, mode: str | None) -> None:
        super().__init__(f"{address:#x} is mapped {mode}")
        self.address = address
        self.mode = mode


class MemoryMap(ABC):
    """The mappings of this process."""

    @abstractmethod
    def find(self, address: int) -> tuple[int, int, str] | None:
        """Begin, end and mode (``rw..``) of the mapping of an address, or else of the next one."""

    def check_writable(self, address: int, size: int) -> None:
        """Raise :class:`NotWritable` unless all of a range of bytes can be read and written."""
        need, end = address, address + size
        while need < end:
            found = self.find(need)
            if found is None or found[0] > need:
                raise NotWritable(need, None)
            if not found[2].startswith("rw"):
                raise NotWritable(need, found[2])
            need = found[1]


def current_mappings() -> MemoryMap:
    """The mappings of this process.

    From Linux 6.11 on, the kernel is asked for single mappings, at the time of each look-up.
    Before, all mappings are read once. That costs time for each mapping, so call this once for many
    ranges.
    """
    kernel = QueriedMappings()
    try:
        kernel.find(0)
    except OSError as error:
        pass_on(error)
        with MAPS.open() as lines:
            return ListedMappings(lines)
    return kernel


class KeptMappings:
    """For `Transport.registering`: looks the mappings up once for many ranges. One thread at a time."""

    def __init__(self) -> None:
        self._kept: MemoryMap | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """While they do not change."""
        self._kept = current_mappings()
        try:
            yield
        finally:
            self._kept = None

    def get(self) -> MemoryMap:
        """Those that are kept, else those of now."""
        return self._kept or current_mappings()


class ListedMappings(MemoryMap):
    """The mappings at one moment, parsed from /proc/self/maps."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._mappings = [_parse(line) for line in lines]
        self._ends = [last for _, last, _ in self._mappings]

    def find(self, address: int) -> tuple[int, int, str] | None:
        """See :class:`MemoryMap`."""
        place = bisect_right(self._ends, address)
        return self._mappings[place] if place < len(self._mappings) else None


class QueriedMappings(MemoryMap):
    """Asks the kernel for one mapping (PROCMAP_QUERY, Linux 6.11). Raises OSError on older kernels."""

    def find(self, address: int) -> tuple[int, int, str] | None:
        """See :class:`MemoryMap`."""
        asked = bytearray(QUERY.size)
        QUERY.pack_into(asked, 0, QUERY.size, COVERING_OR_NEXT, address, 0, 0, 0)
        with MAPS.open("rb", buffering=0) as maps:
            try:
                fcntl.ioctl(maps, PROCMAP_QUERY, asked)
            except OSError as error:
                pass_on(error)
                if error.errno == errno.ENOENT:
                    return None
                raise
        first, last, flags = QUERY.unpack_from(asked)[3:]
        return first, last, ("r" if flags & 1 else "-") + ("w" if flags & 2 else "-")


def _parse(line: str) -> tuple[int, int, str]:
    span, mode = line.split(maxsplit=2)[:2]
    first, last = span.split("-")
    return int(first, 16), int(last, 16), mode

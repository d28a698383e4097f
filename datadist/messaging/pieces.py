"""Memory in pieces: which segments travel in one message, and the copies from and to memory."""

from __future__ import annotations

import ctypes
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["MAX_SEGMENTS", "MIN_PIECE", "Piece", "Spans", "cut", "gather", "numbers", "scatter"]

MAX_SEGMENTS = 4096
"""Most segments of one piece."""
MIN_PIECE = 4096
"""Least bytes of a full piece: smaller ones would cost the engine's thread more than their bytes."""
LARGE = 64 << 10
"""From so many bytes on the GIL is released for a copy."""


class Spans:
    """Ranges of memory that do not overlap."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        self.ranges = sorted(ranges)
        """Begin and end of each."""
        self._begins = [begin for begin, _ in self.ranges]

    def contain(self, address: int, size: int) -> bool:
        """Whether one range contains all ``size`` bytes; ``size`` must be positive."""
        number = bisect_right(self._begins, address)
        return number > 0 and size > 0 and address + size <= self.ranges[number - 1][1]


@dataclass
class Piece:
    """What one request moves: local addresses, the owner's addresses, and bytes of each segment."""

    local: array[int] = field(default_factory=lambda: array("q"))
    remote: array[int] = field(default_factory=lambda: array("q"))
    length: array[int] = field(default_factory=lambda: array("q"))
    size: int = 0

    def add(self, local: int, remote: int, length: int) -> None:
        """One more segment, or a part of one."""
        self.local.append(local)
        self.remote.append(remote)
        self.length.append(length)
        self.size += length


def numbers(vector: Buffer) -> list[int]:
    """The items of an int64 buffer."""
    return memoryview(vector).cast("B").cast("q").tolist()


def cut(segments: Iterable[tuple[int, int, int]], most: int) -> Iterator[Piece]:
    """The same bytes in the same order, in pieces of ``most`` bytes and MAX_SEGMENTS segments at most.

    Only what one piece needs is held at a time.
    """
    piece = Piece()
    for local, remote, length in segments:
        done = 0
        while done < length:
            take = min(length - done, most - piece.size)
            piece.add(local + done, remote + done, take)
            done += take
            if piece.size == most or len(piece.length) == MAX_SEGMENTS:
                yield piece
                piece = Piece()
    if piece.size:
        yield piece


def gather(into: bytearray, at: int, addresses: Iterable[int], lengths: Iterable[int]) -> None:
    """Copy these ranges of memory, one after the other, into ``into`` from its byte ``at`` on."""
    target = _address(into) + at
    for address, length in zip(addresses, lengths, strict=True):
        _copy(length)(target, address, length)
        target += length


def scatter(data: Buffer, at: int, addresses: Iterable[int], lengths: Iterable[int]) -> None:
    """Copy ``data`` from its byte ``at`` on to these ranges of memory, one after the other."""
    whole = data if not memoryview(data).readonly else bytearray(data)
    source = _address(whole) + at
    for address, length in zip(addresses, lengths, strict=True):
        _copy(length)(address, source, length)
        source += length


def _address(buffer: Buffer) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


_WITH_GIL = ctypes.PyDLL(None).memmove
_WITHOUT_GIL = ctypes.CDLL(None).memmove
for _function in (_WITH_GIL, _WITHOUT_GIL):
    _function.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
    _function.restype = ctypes.c_void_p


def _copy(length: int):  # type: ignore[no-untyped-def]
    return _WITHOUT_GIL if length >= LARGE else _WITH_GIL

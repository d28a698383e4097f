"""Cutting a transfer into pieces, each of which is one request and one write of NIXL.

Segments that continue each other at both ends are merged, large ones are split. The work is NumPy's:
its cost does not grow with the segments by more than some nanoseconds each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from datadist_nixl.library import Kind
from datadist_nixl.memory import Ranges, Vector
from datadist_nixl.wire import MAX_PIECE, MAX_SEGMENTS

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from datadist_nixl.memory import NixlRegion

PIECE = 16 << 20
"""Bytes of a piece: large enough to cost nothing, small enough to end soon after a deadline."""
assert PIECE <= MAX_PIECE
LARGE, LARGE_COUNT = 256 << 10, 16


@dataclass(frozen=True)
class Piece:
    """Segments of one kind of memory at each end."""

    local: Vector
    remote: Vector
    length: Vector
    regions: tuple[NixlRegion, ...]
    """Of ours, all that the segments lie in."""
    kind: Kind
    """Of our memory."""
    their_kind: Kind

    @property
    def large(self) -> bool:
        """Whether it takes much longer than asking for it."""
        return len(self.length) > LARGE_COUNT or int(self.length[0]) > LARGE


def vector(values: Buffer) -> Vector:
    """A buffer of int64 as an array, without a copy."""
    return np.frombuffer(values, np.int64)


def pieces(
    local: Vector, remote: Vector, length: Vector, ours: Ranges[NixlRegion], theirs: Ranges[Kind]
) -> list[Piece]:
    """Cut; the segments lie in the ranges, which was checked."""
    if len(length) == 1 and length[0] <= PIECE:
        region = ours.find(int(local[0]), int(length[0]))
        kind = theirs.find(int(remote[0]), int(length[0]))
        return [Piece(local, remote, length, (region,), region.kind, kind)]
    own, other = ours.places(local, length), theirs.places(remote, length)
    keep = _starts(local, remote, length, own, other)
    if not keep.all():
        local, remote, own, other = local[keep], remote[keep], own[keep], other[keep]
        length = np.add.reduceat(length, np.flatnonzero(keep))
    local, remote, length, own, other = _split(local, remote, length, own, other)
    found = []
    for begin, end in _bounds(length, _kinds(own, ours, other, theirs)):
        part = slice(begin, end)
        regions = tuple(ours.some(own[part]))
        kind, their_kind = regions[0].kind, theirs.values[other[begin]]
        found.append(Piece(local[part], remote[part], length[part], regions, kind, their_kind))
    return found


def _starts(
    local: Vector, remote: Vector, length: Vector, own: Vector, other: Vector
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Whether each segment begins a new one: it does not continue the one before at both ends."""
    starts = np.ones(len(length), np.bool_)
    starts[1:] = (
        (local[1:] != local[:-1] + length[:-1]) | (remote[1:] != remote[:-1] + length[:-1])
        | (own[1:] != own[:-1]) | (other[1:] != other[:-1])
    )  # fmt: skip
    return starts


def _split(
    local: Vector, remote: Vector, length: Vector, own: Vector, other: Vector
) -> tuple[Vector, Vector, Vector, Vector, Vector]:
    """Split segments that are longer than a piece."""
    counts = -(-length // PIECE)
    if int(counts.max()) == 1:
        return local, remote, length, own, other
    index = np.repeat(np.arange(len(length)), counts)
    step = (np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)) * PIECE
    parts = np.minimum(length[index] - step, PIECE)
    return local[index] + step, remote[index] + step, parts, own[index], other[index]


def _kinds(own: Vector, ours: Ranges[NixlRegion], other: Vector, theirs: Ranges[Kind]) -> Vector:
    """A number for each segment that is equal for equal kinds of memory."""
    if len(ours.values) == len(theirs.values) == 1:
        return own
    numbers: dict[Kind, int] = {}
    mine = np.array([numbers.setdefault(r.kind, len(numbers)) for r in ours.values], np.int64)
    other_kinds = [numbers.setdefault(kind, len(numbers)) for kind in theirs.values]
    return mine[own] * len(numbers) + np.array(other_kinds, np.int64)[other]


def _bounds(length: Vector, kinds: Vector) -> list[tuple[int, int]]:
    """First and last segment of each piece: at most so many bytes and segments, and of one kind."""
    ends, total = np.cumsum(length), len(length)
    changes = np.append(np.flatnonzero(kinds[1:] != kinds[:-1]) + 1, total)
    found, begin = [], 0
    while begin < total:
        room = (int(ends[begin - 1]) if begin else 0) + PIECE
        end = int(np.searchsorted(ends, room, side="right"))
        change = int(changes[np.searchsorted(changes, begin, side="right")])
        end = max(begin + 1, min(end, begin + MAX_SEGMENTS, change))
        found.append((begin, end))
        begin = end
    return found

"""Cutting large transfers into pieces, between which others get a turn, and a user can give one up.

Where a link has few permits (:attr:`Capabilities.parallel`), a small transfer would wait for the end of a
large one. So who holds the last permit moves a piece at a time, and lets those who wait go first.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from datadist.transfers.plan import Segments

__all__ = ["MIN_PIECE", "Cutter", "move_pieces"]

MIN_PIECE = 1 << 20
"""Smallest piece in bytes, and the largest transfer that is not cut."""
FIRST_PIECE = 4 << 20
GROWTH = 4
"""By how much a piece is larger than the one before it, at most."""
ROUND = 64 << 10
"""Pieces of a large segment are multiples of it."""


class Cutter:
    """Takes segments apart, from the first byte to the last one."""

    def __init__(self, segments: Segments) -> None:
        self._local, self._remote, self._length = (
            _vector(each) for each in (segments.local, segments.remote, segments.length)
        )
        self._ends = np.cumsum(self._length)
        self.taken = 0
        """Bytes so far."""

    @property
    def left(self) -> int:
        """Bytes to come."""
        return int(self._ends[-1]) - self.taken

    def next(self, nbytes: int) -> Segments:
        """The next piece of at most ``nbytes``, :data:`ROUND` or more; only what is larger is cut."""
        first = int(np.searchsorted(self._ends, self.taken, "right"))
        end = min(self.taken + nbytes, int(self._ends[-1]))
        last = int(np.searchsorted(self._ends, end, "left"))
        if self._ends[last] > end:
            if last > first:
                last -= 1
                end = int(self._ends[last])
            else:
                end = self.taken + nbytes // ROUND * ROUND
        local, remote, length = (
            each[first : last + 1].copy() for each in (self._local, self._remote, self._length)
        )
        skipped = self.taken - (int(self._ends[first]) - int(self._length[first]))
        local[0] += skipped
        remote[0] += skipped
        length[0] -= skipped
        length[-1] -= int(self._ends[last]) - end
        piece = Segments(local, remote, length, end - self.taken)
        self.taken = end
        return piece


def move_pieces(
    segments: Segments,
    seconds: float,
    move: Callable[[Segments], None],
    turn: Callable[[int], None],
) -> None:
    """Call ``move`` for one piece after another, of about ``seconds`` each.

    Before each but the first ``turn`` is called with the bytes that were moved; what either raises ends
    it.
    """
    cutter, size = Cutter(segments), FIRST_PIECE
    while cutter.left:
        if cutter.taken:
            turn(cutter.taken)
        began = monotonic()
        piece = cutter.next(size)
        move(piece)
        took = max(monotonic() - began, 1e-6)
        size = max(MIN_PIECE, min(int(piece.nbytes * seconds / took), GROWTH * size))


def _vector(values: object) -> NDArray[np.int64]:
    return np.asarray(values, np.int64)

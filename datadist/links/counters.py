"""What went over each link: operations, bytes, errors and seconds, by direction."""

from __future__ import annotations

import threading
from collections import deque
from typing import TypeAlias

__all__ = ["MOST_NOTED", "Counters", "Ledger", "Tally"]

Noted: TypeAlias = "tuple[int, tuple[Tally, ...], int, float]"
"""The token of a transfer, where it counts, its bytes and seconds."""
MOST_NOTED = 256
"""So many operations wait to be added up, at most about."""


class Tally:
    """Counts of one direction. An operation that failed counts no bytes.

    All are bound in one step: a handler of a signal finds an operation counted wholly or not at all.
    """

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts = 0, 0, 0, 0.0, 0
        """Operations, bytes, errors, seconds, and the token of the last one of a :class:`Ledger`."""

    def add(self, nbytes: int, seconds: float) -> None:
        """Count an operation that went well."""
        operations, moved, errors, took, last = self._counts
        self._counts = operations + 1, moved + nbytes, errors, took + seconds, last

    def add_once(self, token: int, count: int, nbytes: int, seconds: float) -> None:
        """The same for several of a ledger, up to that of ``token``, unless they were added before."""
        operations, moved, errors, took, last = self._counts
        if token != last:
            self._counts = operations + count, moved + nbytes, errors, took + seconds, token

    def add_error(self, seconds: float) -> None:
        """Count one that failed."""
        operations, moved, errors, took, last = self._counts
        self._counts = operations, moved, errors + 1, took + seconds, last

    def as_dict(self) -> dict[str, int | float]:
        """Plain numbers."""
        operations, moved, errors, seconds, _ = self._counts
        return {"operations": operations, "bytes": moved, "errors": errors, "seconds": seconds}


class Ledger:
    """Guards tallies, and notes operations that are not in them yet.

    Noting one is a single step without a lock, which takes a fifth of the time of counting it.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held by who changes tallies or reads them; handlers of signals may ask for them."""
        self.noted: deque[Noted] = deque()
        """Whoever appends to it looks for :data:`MOST_NOTED`."""
        self._adding = False
        self._batch = 0
        """Token of the last one of those that are being added: the same ones again after an interrupt."""

    def add_up(self) -> None:
        """Count what is noted by now. What was interrupted is completed by the next call."""
        with self.lock:
            if self._adding:  # this thread does, below the handler of a signal
                return
            try:
                self._adding = True
                noted, done = list(self.noted), 0
                while done < len(noted):
                    done = self._add_batch(noted, done)
            finally:
                self._adding = False

    def _add_batch(self, noted: list[Noted], first: int) -> int:
        """Count those of one link from the ``first`` on; the place after the last of them."""
        tallies, end = noted[first][1], self._end_of_batch(noted, first)
        batch = noted[first:end]
        nbytes, seconds = sum(each[2] for each in batch), sum(each[3] for each in batch)
        for tally in tallies:
            tally.add_once(self._batch, len(batch), nbytes, seconds)
        # Nothing is added again once the first one is out: every tally has the token.
        for _ in batch:
            self.noted.popleft()
        return end

    def _end_of_batch(self, noted: list[Noted], first: int) -> int:
        """Where an interrupted batch ends; else that of a new one, whose token is kept."""
        end = first
        while end < len(noted) and noted[end][1] is noted[first][1]:
            end += 1
            if noted[end - 1][0] == self._batch:
                return end
        self._batch = noted[end - 1][0]
        return end


class Counters:
    """Both directions of one link to one peer, or of an engine: what *we* began."""

    __slots__ = ("pull", "push")

    def __init__(self) -> None:
        self.pull = Tally()
        self.push = Tally()

    def as_dict(self) -> dict[str, dict[str, int | float]]:
        """Plain numbers."""
        return {"pull": self.pull.as_dict(), "push": self.push.as_dict()}

"""A read or write of one caller, and the requests that it consists of."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

from datadist.transport import TransferError, TransportError
from datadist_nixl.segments import Piece
from datadist_nixl.side import Side

MAX_TRIES = 4
"""So often a piece is asked for, where connections of NIXL are given up meanwhile."""


class Request:
    """One piece, while its owner has been asked."""

    __slots__ = ("begun", "handle", "index", "large", "settled", "transfer")

    def __init__(self, transfer: Transfer, index: int) -> None:
        self.transfer = transfer
        self.index = index
        self.large = transfer.pieces[index].large
        self.handle: Any = None
        """Of NIXL, for a write that was allowed."""
        self.begun = False
        """Whether it touches memory by now: always for a read, whose owner may begin at any time."""
        self.settled = False
        """Whether it touches no memory any more."""


class Transfer:
    """It is its own :class:`~datadist.transport.InFlight`, for what goes on after the call."""

    def __init__(self, side: Side, write: bool, pieces: Sequence[Piece]) -> None:
        self.side = side
        self.write = write
        self.pieces = pieces
        self.todo = deque(range(len(pieces)))
        self.requests: dict[int, Request] = {}
        """Those that are not settled, by number."""
        self.given_up: list[Request] = []
        """Writes whose end the owner has to confirm."""
        self._done: set[int] = set()
        self._tries = 0
        self._outcomes: list[tuple[TransportError | None]] = []
        """The first one counts."""
        self._wake = threading.Lock()
        self._wake.acquire()

    @property
    def ended(self) -> bool:
        """Whether the outcome is known: nothing is asked or begun any more."""
        return bool(self._outcomes)

    def end(self, error: TransportError | None) -> None:
        """The first outcome counts. From any thread, never blocks."""
        self._outcomes.append((error,))
        self.nudge()

    def nudge(self) -> None:
        """Wake the caller, who looks whether it has to lead."""
        try:
            self._wake.release()
        except RuntimeError:  # it was released
            return

    def wait(self, seconds: float) -> None:
        """Until :meth:`nudge`."""
        self._wake.acquire(timeout=seconds)

    def result(self) -> None:
        """Raise what :meth:`end` was given."""
        error = self._outcomes[0][0]
        if error is not None:
            raise error

    def piece_done(self, index: int) -> None:
        """Every byte of a piece is in place."""
        self._done.add(index)
        if len(self._done) == len(self.pieces):
            self.end(None)

    def again(self, reason: str, counts: bool = True) -> None:
        """Ask again for what is not done."""
        self._tries += counts
        if self._tries >= MAX_TRIES:
            self.end(TransferError(f"rank {self.side.rank}: {reason}", link_usable=True))
        self.todo = deque(i for i in range(len(self.pieces)) if i not in self._done)

    def settled(self) -> bool:
        """See :class:`datadist.transport.InFlight`."""
        if not self.ended:
            self.end(TransferError("the call was interrupted", link_usable=True))
        left = [*self.requests.copy().values(), *self.given_up]
        return all(each.settled or not each.begun for each in left)

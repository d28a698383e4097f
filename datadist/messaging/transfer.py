"""A read or write of one caller, which waits while the thread of the engine moves its pieces."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from datadist.base.texts import in_seconds
from datadist.messaging.copying import Copying
from datadist.messaging.pieces import Piece, gather, scatter
from datadist.transport import TransferError, TransferTimeout, TransportError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from datadist.messaging.side import Side

__all__ = ["Transfer"]

COPY_SECONDS = 0.25
"""So long a caller whose transfer has failed waits for the copy of a piece."""


class Transfer:
    """It is its own :class:`~datadist.transport.InFlight`, for what goes on after :meth:`leave`.

    That is a copy of the engine's thread that waits for a page, and pieces of a write that were sent:
    the owner may take them at any time, until it has answered or ended its side.
    """

    def __init__(self, side: Side, write: bool, pieces: Iterator[Piece], timeout: float) -> None:
        self.side = side
        self.write = write
        self._copying = Copying()
        self._outcomes: list[tuple[TransportError | None]] = []
        """The first one counts."""
        self._pieces = pieces
        self._next = next(pieces, None)
        self._unanswered = 0
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._done = threading.Lock()
        self._done.acquire()

    @property
    def ended(self) -> bool:
        """Whether the outcome is known: nothing is asked or copied any more."""
        return bool(self._outcomes)

    def wait(self) -> None:
        """Wait until every piece has arrived. Raises what :meth:`end` was given."""
        left = max(0.0, self._deadline - time.monotonic())
        if not self._done.acquire(timeout=min(left, threading.TIMEOUT_MAX)):
            text = f"rank {self.side.rank} did not send or take all in {in_seconds(self._timeout)}"
            self.end(TransferTimeout(text, link_usable=True))
        error = self._outcomes[0][0]
        if error is not None:
            raise error

    def end(self, error: TransportError | None) -> None:
        """Wake the caller, if this is the first time. From any thread, never blocks."""
        outcome = (error,)
        self._copying.forbid()
        self._outcomes.append(outcome)
        if self._outcomes[0] is outcome:
            self._done.release()

    def leave(self, error: BaseException) -> None:
        """The caller leaves with this error, which says whether something goes on without it."""
        self.end(TransferError("the call was interrupted", link_usable=True))
        self._copying.wait(time.monotonic() + COPY_SECONDS)
        error.in_flight = None if self.settled() else self  # type: ignore[attr-defined]

    def settled(self) -> bool:
        """See :class:`datadist.transport.InFlight`. It ends first, if :meth:`leave` was interrupted."""
        if not self.ended:
            self.end(TransferError("the call was interrupted", link_usable=True))
        if self._copying.running:
            return False
        return not (self.write and self._unanswered) or self.side.fenced

    def wait_for_copy(self, until: float) -> bool:
        """After :meth:`end`: whether our memory is left alone, at ``until`` at the latest."""
        return self._copying.wait(until)

    # -- on the thread of the engine -------------------------------------------------------------

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return self._deadline - time.monotonic()

    @property
    def more(self) -> bool:
        """Whether there is a piece that was not asked for."""
        return not self.ended and self._next is not None

    def take_piece(self) -> Piece:
        """The next piece to ask for; there must be :attr:`more`. It counts as asked from now on."""
        assert self._next is not None
        self._unanswered += 1
        piece, self._next = self._next, next(self._pieces, None)
        return piece

    def not_asked(self) -> None:
        """The piece that was taken last was not sent."""
        self._unanswered -= 1

    def read_local(self, piece: Piece, message: bytearray, at: int) -> bool:
        """Copy the piece's bytes from local memory; False where the transfer has ended."""
        return self._copying.run(partial(gather, message, at, piece.local, piece.length))

    def answered(self, piece: Piece, data: Buffer | None = None, at: int = 0) -> None:
        """A piece was answered; ``data`` of a read goes to local memory unless the transfer has ended."""
        if data is not None:
            self._copying.run(partial(scatter, data, at, piece.local, piece.length))
        self._unanswered -= 1
        if self._next is None and not self._unanswered:
            self.end(None)

"""A read or write of one caller, which waits while the thread of the engine moves its pieces."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from datadist.base.texts import in_seconds
from datadist.messaging.pieces import Piece, gather, scatter
from datadist.transport import TransferError, TransferTimeout, TransportError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from datadist.messaging.side import Side

__all__ = ["Transfer"]


class Transfer:
    """Nothing of it touches local memory after :meth:`wait` has ended, however that ended.

    ``lock`` is held while a piece is copied, and while the transfer ends.
    """

    def __init__(self, side: Side, write: bool, pieces: Iterator[Piece], timeout: float) -> None:
        self.side = side
        self.write = write
        self.ended = False
        self._pieces = pieces
        self._next = next(pieces, None)
        self._unanswered = 0
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._lock = threading.RLock()
        self._done = threading.Lock()
        self._done.acquire()
        self._error: TransportError | None = None

    def wait(self) -> None:
        """Wait until every piece has arrived. Raises what :meth:`end` was given."""
        try:
            left = max(0.0, self._deadline - time.monotonic())
            if not self._done.acquire(timeout=min(left, threading.TIMEOUT_MAX)):
                text = (
                    f"rank {self.side.rank} did not send or take all in {in_seconds(self._timeout)}"
                )
                self.end(TransferTimeout(text, link_usable=True))
        except BaseException:
            self.end(TransferError("the call was interrupted", link_usable=True))
            raise
        if self._error is not None:
            raise self._error

    def end(self, error: TransportError | None) -> None:
        """Wake the caller, if this is the first time. From any thread."""
        with self._lock:
            if not self.ended:
                self._error = error
                self.ended = True
                self._done.release()

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
        """The next piece to ask for; there must be :attr:`more`."""
        assert self._next is not None
        piece, self._next = self._next, next(self._pieces, None)
        self._unanswered += 1
        return piece

    def read_local(self, piece: Piece, message: bytearray, at: int) -> bool:
        """Copy the piece's bytes from local memory; False where the transfer has ended."""
        with self._lock:
            if not self.ended:
                gather(message, at, piece.local, piece.length)
            return not self.ended

    def answered(self, piece: Piece, data: Buffer | None = None, at: int = 0) -> None:
        """A piece was answered; ``data`` of a read goes to local memory unless the transfer has ended."""
        with self._lock:
            if self.ended:
                return
            if data is not None:
                scatter(data, at, piece.local, piece.length)
            self._unanswered -= 1
            if self._next is None and not self._unanswered:
                self.end(None)

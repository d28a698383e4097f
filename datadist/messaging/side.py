"""Our side of the path between a link and one of its ranks: what is granted, and whether it has ended."""

from __future__ import annotations

import secrets
import threading
from typing import TYPE_CHECKING, Protocol

from datadist.messaging.pieces import Spans, gather, scatter
from datadist.messaging.wire import SECRET_BYTES, OfferFields, Refusal, Request
from datadist.transport import Access, PeerLost, TransferError, TransportError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Side"]


class Ending(Protocol):
    """What ends with a side: transfers."""

    def end(self, error: TransportError | None) -> None:
        """Fail; from any thread."""


class Side:
    """What a peer may do with our memory over one link, and what we know of its memory.

    ``lock`` is held while a peer's data is copied into our memory or from it, and while the side ends:
    after :meth:`end` nothing of the peer touches our memory.
    """

    def __init__(self, rank: int, spans: Spans, access: Access) -> None:
        self.rank = rank
        self.secret = secrets.token_bytes(SECRET_BYTES)
        """The peer's requests carry it."""
        self.offer: OfferFields | None = None
        """The peer's, once it was attached."""
        self.theirs = Spans(())
        self.incarnation: str | None = None
        """The peer's, once it was attached."""
        self.peer_attached = False
        """The peer has our offer, and can answer: nothing is asked before."""
        self.peer_session = b""
        """Secret of the session over which the peer attached our offer."""
        self.peer_closed = False
        """The peer asks for nothing any more."""
        self.peer_told = False
        """We have told the peer that this side has ended."""
        self._spans = spans
        self._access = access
        self._lock = threading.RLock()
        self._ended: tuple[str, bool] | None = None
        self._transfers: set[Ending] = set()

    # -- asking ----------------------------------------------------------------------------------

    def attached(self, offer: OfferFields, incarnation: str) -> None:
        """The offer of this peer was taken."""
        self.theirs = Spans(offer.ranges)
        self.incarnation = incarnation
        self.offer = offer

    def error(self) -> TransferError | None:
        """Why nothing can be moved any more; None as long as it can."""
        if self._ended is None:
            return None
        reason, lost = self._ended
        return (
            PeerLost(f"rank {self.rank} is lost: {reason}", self.rank)
            if lost
            else TransferError(reason)
        )

    def begin(self, transfer: Ending) -> None:
        """A transfer is about to start; it is ended with the side. Raises :meth:`error`."""
        with self._lock:
            error = self.error()
            if error is None:
                self._transfers.add(transfer)
        if error is not None:
            raise error

    def finish(self, transfer: Ending) -> None:
        """The transfer has ended."""
        self._transfers.discard(transfer)

    # -- answering, on the thread of the engine ----------------------------------------------------

    def refusal(self, write: bool, request: Request) -> Refusal | None:
        """Why the peer may not have what it asks for; None where it may."""
        if self._ended is not None:
            return Refusal.CLOSED
        if write and self._access is Access.READ:
            return Refusal.FORBIDDEN
        inside = map(self._spans.contain, request.addresses, request.lengths)
        return None if all(inside) else Refusal.OUTSIDE

    def copy_out(self, request: Request, into: bytearray, at: int) -> bool:
        """Copy from our memory; False where the side has ended."""
        with self._lock:
            if self._ended is None:
                gather(into, at, request.addresses, request.lengths)
            return self._ended is None

    def copy_in(self, request: Request, message: Buffer) -> bool:
        """Copy the request's data into our memory; False where the side has ended."""
        with self._lock:
            if self._ended is None:
                scatter(message, request.data_at, request.addresses, request.lengths)
            return self._ended is None

    # -- the end ---------------------------------------------------------------------------------

    @property
    def ended(self) -> str | None:
        """Why it has ended."""
        return None if self._ended is None else self._ended[0]

    def end(self, reason: str, lost: bool = False) -> None:
        """Fail transfers, now and later, and refuse requests. From any thread; waits for one copy."""
        with self._lock:
            self._ended = self._ended or (reason, lost)
            transfers = list(self._transfers)
        for transfer in transfers:
            transfer.end(self.error())

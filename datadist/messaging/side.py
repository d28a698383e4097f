"""Our side of the path between a link and one of its ranks: what is granted, and whether it has ended."""

from __future__ import annotations

import secrets
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

from datadist.messaging.copying import Copying
from datadist.messaging.pieces import Spans, gather, scatter
from datadist.messaging.wire import SECRET_BYTES, OfferFields, Refusal, Request
from datadist.transport import Access, PeerLost, TransferError, TransportError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Side"]


class Ending(Protocol):
    """What ends with a side: transfers."""

    def end(self, error: TransportError | None) -> None:
        """Fail; from any thread, never blocks."""

    def settled(self) -> bool:
        """Whether nothing of it goes on, once its caller has left."""

    def wait_for_copy(self, until: float) -> bool:
        """Whether it leaves our memory alone, at ``until`` at the latest."""


class Side:
    """What a peer may do with our memory over one link, and what we know of its memory.

    It ends in one step, from any thread: after :meth:`end` no copy begins between our memory and
    messages of the peer. A copy that runs is waited for by :meth:`wait_for_copies`.
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
        self.peer_secret = b""
        """Of the peer's side, as it said when it attached our offer."""
        self.peer_begun = 0
        """When that session began, by the peer's clock; a later one begins when it is over."""
        self.peer_closed = False
        """The peer asks for nothing any more."""
        self.peer_left = False
        """The peer's session has ended as well: messages of it may come later, and are dropped."""
        self.peer_told = False
        """We have told the peer that this side has ended."""
        self.fenced = False
        """Nothing of ours touches the peer's memory any more: it has ended its side, or is gone."""
        self.removed = False
        """The link is closed, and our part of the table of sides is settled."""
        self._spans = spans
        self._access = access
        self._copying = Copying()
        self._ends: list[tuple[str, bool, float]] = []
        """Reasons, whether the peer is lost, and when it was; the first one counts."""
        self._transfers: set[Ending] = set()
        self._left: set[Ending] = set()
        """Those that went on when their callers left."""

    # -- asking ----------------------------------------------------------------------------------

    def attached(self, offer: OfferFields, theirs: Spans, incarnation: str) -> None:
        """The offer of this peer was taken; ``theirs`` are its ranges."""
        self.theirs = theirs
        self.incarnation = incarnation
        self.offer = offer

    @property
    def greeting(self) -> bytes:
        """What the HELLO of the peer had, once it has attached our offer."""
        return self.peer_session + self.peer_secret

    def forget_ranges(self) -> None:
        """The link is closed. The side may be kept for long: until the peer has closed its own."""
        self.theirs = self._spans = Spans(())
        if self.offer is not None:
            self.offer = replace(self.offer, ranges=())

    def error(self) -> TransferError | None:
        """Why nothing can be moved any more; None as long as it can."""
        if not self._ends:
            return None
        reason, lost, _ = self._ends[0]
        return (
            PeerLost(f"rank {self.rank} is lost: {reason}", self.rank)
            if lost
            else TransferError(reason)
        )

    def begin(self, transfer: Ending) -> None:
        """A transfer is about to start; it is ended with the side. Raises :meth:`error`."""
        self._transfers.add(transfer)  # before the look: see `end`
        error = self.error()
        if error is not None:
            raise error

    def finish(self, transfer: Ending) -> None:
        """The caller of the transfer has left, or did not begin it."""
        self.settled()
        if not transfer.settled():
            self._left.add(transfer)
        self._transfers.discard(transfer)

    def settled(self) -> bool:
        """Whether nothing goes on of the transfers whose callers have left."""
        for transfer in self._left.copy():
            if transfer.settled():
                self._left.discard(transfer)
        return not self._left

    # -- answering, on the thread of the engine ----------------------------------------------------

    def refusal(self, write: bool, request: Request) -> Refusal | None:
        """Why the peer may not have what it asks for; None where it may."""
        if self._ends:
            return Refusal.CLOSED
        if write and self._access is Access.READ:
            return Refusal.FORBIDDEN
        inside = map(self._spans.contain, request.addresses, request.lengths)
        return None if all(inside) else Refusal.OUTSIDE

    def copy_out(self, request: Request, into: bytearray, at: int) -> bool:
        """Copy from our memory; False where the side has ended."""
        return self._copying.run(partial(gather, into, at, request.addresses, request.lengths))

    def copy_in(self, request: Request, message: Buffer) -> bool:
        """Copy the request's data into our memory; False where the side has ended."""
        return self._copying.run(
            partial(scatter, message, request.data_at, request.addresses, request.lengths)
        )

    # -- the end ---------------------------------------------------------------------------------

    @property
    def ended(self) -> str | None:
        """Why it has ended."""
        return self._ends[0][0] if self._ends else None

    @property
    def ended_at(self) -> float | None:
        """When it has ended (monotonic)."""
        return self._ends[0][2] if self._ends else None

    def end(self, reason: str, lost: bool = False) -> None:
        """Fail transfers, now and later, and refuse requests. From any thread, never blocks."""
        self._copying.forbid()
        self._ends.append((reason, lost, time.monotonic()))
        for transfer in self._transfers.copy():
            transfer.end(self.error())

    @property
    def is_copying(self) -> bool:
        """Whether bytes of the peer, or for it, are copied now; after :meth:`end` that begins no more."""
        return self._copying.running

    def wait_for_copies(self, until: float) -> bool:
        """After :meth:`end`: whether no copy for the peer runs, at ``until`` (monotonic) at the latest.

        Those of our own transfers are waited for as well; who called them says if they go on.
        """
        for transfer in self._transfers.copy():
            transfer.wait_for_copy(until)
        return self._copying.wait(until)

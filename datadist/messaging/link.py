"""A link whose owners move the bytes, over the sessions with the peers of its ranks."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from datadist.base.closing import close_elsewhere
from datadist.base.texts import in_seconds
from datadist.messaging.dispatcher import Dispatcher
from datadist.messaging.engine import Engine
from datadist.messaging.loop import LoopEnded
from datadist.messaging.pieces import Spans, cut, numbers
from datadist.messaging.side import Side
from datadist.messaging.transfer import Transfer
from datadist.messaging.wire import OfferFields, WireError, parse_offer, seal_offer
from datadist.transport import (
    Access,
    AddressError,
    Group,
    Link,
    LinkError,
    Offer,
    Region,
    TransferError,
    Unsupported,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["MessagingLink"]

log = logging.getLogger("datadist.messaging")

CLOSE_SECONDS = 2.0
"""So long `close` waits for a copy whose memory does not come."""
FORCE_SECONDS = 2.0
LEAVE_TRIES = 100
"""So often handlers of signals may raise while a caller leaves its transfer."""


class MessagingLink(Link):
    """See :class:`datadist.transport.Link`."""

    def __init__(
        self, group: Group, regions: Sequence[Region], access: Access,
        engine: Engine, dispatcher: Dispatcher,
    ) -> None:  # fmt: skip
        self._group = group
        self._engine = engine
        self._access = access
        self._dispatcher = dispatcher
        self._spans = Spans((region.address, region.address + region.size) for region in regions)
        self._sides = {
            rank: Side(rank, self._spans, access) for rank in group.peers if rank != group.rank
        }
        for side in self._sides.values():
            dispatcher.add_side(side)

    def offer(self, rank: int) -> Offer:
        """The engine's address, our ranges, and the secret that requests must carry."""
        fields = OfferFields(
            self._dispatcher.address, self._sides[rank].secret, self._access is Access.READ_WRITE,
            self._engine.piece, self._engine.window, self._spans.ranges,
        )  # fmt: skip
        return Offer(seal_offer(fields))

    def attach(self, rank: int, offer: Offer) -> None:
        """Share the session with the peer's process, or begin one."""
        side, peer = self._sides[rank], self._group.peers[rank]
        if offer.fds:
            _close(offer.fds)
            text = f"it has {len(offer.fds)} descriptors, expected none"
            raise LinkError(f"the offer of rank {rank} is of no use: {text}", rank)
        try:
            fields = parse_offer(bytes(offer.data))
        except WireError as error:
            raise LinkError(f"the offer of rank {rank} is of no use: {error}", rank) from None
        if side.offer is not None:
            raise LinkError(f"rank {rank} was attached before", rank)
        dispatcher, theirs = self._dispatcher, Spans(fields.ranges)
        try:
            dispatcher.loop.ask(
                lambda: dispatcher.attach(side, peer, fields, theirs), self._group.remaining()
            )
        except LoopEnded as error:
            raise LinkError(f"rank {rank} was not attached: {error}", rank) from None

    # -- moving ----------------------------------------------------------------------------------

    def read(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        """Ask for the bytes piece by piece."""
        self._move(False, rank, local, remote, length, timeout)

    def write(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        """Send the bytes piece by piece; the owner puts them in place."""
        self._move(True, rank, local, remote, length, timeout)

    def _move(
        self, write: bool, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        side = self._side(rank)
        offer, dispatcher = side.offer, self._dispatcher
        if offer is None:
            raise side.error() or TransferError(f"rank {rank} was not attached")
        if write and not offer.writable:
            raise Unsupported(f"rank {rank} granted read access only")
        remotes, lengths = numbers(remote), numbers(length)
        for address, size in zip(remotes, lengths, strict=True):
            if not side.theirs.contain(address, size):
                text = f"rank {rank} did not offer {size} bytes at {address:#x}"
                raise side.error() or AddressError(text)
        segments = zip(numbers(local), remotes, lengths, strict=True)
        pieces = cut(segments, min(self._engine.piece, offer.piece))
        transfer = Transfer(side, write, pieces, timeout)
        try:
            side.begin(transfer)
            dispatcher.loop.call(partial(dispatcher.start, side, transfer))
            transfer.wait()
            side.finish(transfer)
        except BaseException as error:
            error.in_flight = transfer  # type: ignore[attr-defined]  # at once: see `Transfer.settled`
            try:
                last = _leave(side, transfer, error)
            except BaseException as other:  # of a signal handler; it takes the place of the first
                other.in_flight = transfer  # type: ignore[attr-defined]
                last = _leave(side, transfer, other)
            if last is error:
                raise
            raise last  # noqa: B904 - unchanged: it has been raised while `error` was handled

    def _side(self, rank: int) -> Side:
        side = self._sides.get(rank)
        if side is None:
            raise TransferError(f"rank {rank} is not a peer of this link")
        return side

    # -- the end ---------------------------------------------------------------------------------

    def abort(self, rank: int) -> bool:
        """End the side here and now; the thread of the engine tells the peer.

        Returns whether that thread is copying bytes of the peer.
        """
        side = self._sides.get(rank)
        if side is None:
            return False
        reason = "the link was aborted"
        side.end(reason)
        self._dispatcher.loop.call(partial(self._dispatcher.end_side, side, reason))
        return side.is_copying

    def force(self, rank: int) -> None:
        """End the side, and wait until the peer has confirmed that it takes nothing any more.

        The time for that begins with the end of the side: ranks that were aborted at once are waited
        for together. Raises :class:`TransferError` where it does not come: the peer is stopped, or a
        page of its memory or of ours does not come. The side has ended then, too.
        """
        side = self._side(rank)
        self.abort(rank)
        until = (side.ended_at or time.monotonic()) + FORCE_SECONDS
        while not side.settled():
            if time.monotonic() >= until:
                raise TransferError(
                    f"rank {rank} has not confirmed within {in_seconds(FORCE_SECONDS)} that it takes "
                    "no bytes any more (is it stopped?), or a page of our memory does not come"
                )
            time.sleep(0.005)

    def close(self) -> frozenset[int]:
        """End all sides here and now. Nobody writes our memory but our own thread.

        A rank is named only where that thread has begun to copy its bytes, and waits for a page.
        """
        for side in self._sides.values():
            side.end("the link is closed")
        until = time.monotonic() + CLOSE_SECONDS
        stuck = [rank for rank, side in self._sides.items() if not side.wait_for_copies(until)]
        for side in self._sides.values():
            self._dispatcher.loop.call(partial(self._dispatcher.remove_side, side))
        if stuck:
            log.warning("a page of memory does not come, which ranks %s read or write", stuck)
        return frozenset(stuck if self._access is Access.READ_WRITE else ())


def _leave(side: Side, transfer: Transfer, error: BaseException) -> BaseException:
    """The error with which the caller leaves: the last one that handlers of signals raised meanwhile."""
    for _ in range(LEAVE_TRIES):
        try:
            transfer.leave(error)
            side.finish(transfer)
            break
        except BaseException as other:
            error = other
            error.in_flight = transfer  # type: ignore[attr-defined]
    return error


def _close(fds: Sequence[int]) -> None:
    """Descriptors that an offer should not have."""
    try:
        close_elsewhere(fds)
    except RuntimeError as error:
        raise LinkError(f"descriptors of an offer stay open: {error}") from None

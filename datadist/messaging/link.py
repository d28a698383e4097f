"""A link whose owners move the bytes, over the sessions with the peers of its ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

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
        self._to_remove = tuple(self._sides.values())
        for side in self._to_remove:
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
        for fd in offer.fds:  # our offers have none
            os.close(fd)
        side, peer = self._sides[rank], self._group.peers[rank]
        try:
            fields = parse_offer(bytes(offer.data))
        except WireError as error:
            raise LinkError(f"the offer of rank {rank} is of no use: {error}", rank) from None
        if side.offer is not None:
            raise LinkError(f"rank {rank} was attached before", rank)
        dispatcher = self._dispatcher
        try:
            dispatcher.loop.ask(
                lambda: dispatcher.attach(side, peer, fields), self._group.remaining()
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
                raise AddressError(f"rank {rank} did not offer {size} bytes at {address:#x}")
        segments = zip(numbers(local), remotes, lengths, strict=True)
        pieces = cut(segments, min(self._engine.piece, offer.piece))
        transfer = Transfer(side, write, pieces, timeout)
        side.begin(transfer)
        try:
            dispatcher.loop.call(lambda: dispatcher.start(side, transfer))
            transfer.wait()
        finally:
            side.finish(transfer)

    def _side(self, rank: int) -> Side:
        side = self._sides.get(rank)
        if side is None:
            raise TransferError(f"rank {rank} is not a peer of this link")
        return side

    # -- the end ---------------------------------------------------------------------------------

    def abort(self, rank: int) -> None:
        """The thread of the engine ends the side; the peer's requests are refused from then on."""
        side = self._sides.get(rank)
        if side is not None:
            self._dispatcher.loop.call(
                lambda: self._dispatcher.end_side(side, "the link was aborted")
            )

    def close(self) -> frozenset[int]:
        """End all sides here and now. Nobody writes our memory but our own thread: nobody is named."""
        for side in self._sides.values():
            side.end("the link is closed")
        sides, self._to_remove = self._to_remove, ()
        for side in sides:
            self._dispatcher.loop.call(partial(self._dispatcher.remove_side, side))
        return frozenset()

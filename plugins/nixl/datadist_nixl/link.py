"""One communication domain over NIXL: who may reach our memory, and our ways to the others'."""

from __future__ import annotations

import select
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from datadist.base.closing import close_elsewhere
from datadist.transport import (
    Access,
    AddressError,
    Group,
    Link,
    LinkError,
    Offer,
    TransferError,
    Unsupported,
)
from datadist_nixl.asking import Asker
from datadist_nixl.library import Kind
from datadist_nixl.memory import NixlRegion, Outside, Ranges, Vector
from datadist_nixl.offer import make_offer, parse_offer
from datadist_nixl.segments import Piece, pieces, vector
from datadist_nixl.service import Service
from datadist_nixl.side import Side
from datadist_nixl.transfer import Transfer

if TYPE_CHECKING:
    from typing_extensions import Buffer

CLOSE_SECONDS = 2.0
FINISH_SECONDS = 0.1
"""So long reads that were given up may take to end by themselves, before they are ended."""


class NixlLink(Link):
    """See :class:`datadist.transport.Link`; ``local`` gives all our memory."""

    def __init__(
        self, local: Callable[[], Ranges[NixlRegion]], group: Group,
        regions: Sequence[NixlRegion], access: Access, service: Service,
    ) -> None:  # fmt: skip
        self._local = local
        self._group = group
        self._regions = regions
        self._service = service
        self._closed = False
        self._askers: dict[int, Asker] = {}
        self._sides = {
            rank: Side(rank, regions, access) for rank in group.peers if rank != group.rank
        }
        self._moving: dict[int, dict[Transfer, None]] = {rank: {} for rank in self._sides}
        """Transfers that go on, or have not settled."""
        service.sides.update({side.secret: side for side in self._sides.values()})

    def offer(self, rank: int) -> Offer:
        """Where we are asked, the secret for that, and our ranges."""
        side = self._sides[rank]
        where = self._service.address, self._group.peers[rank].connection.greeting
        rows = [(r.address, r.size, *r.kind) for r in self._regions]
        return Offer(make_offer(*where, side.secret, side.writable, rows))

    def attach(self, rank: int, offer: Offer) -> None:
        """Share the connection to the peer's process, or make one; the peer need not run."""
        side, peer = self._sides[rank], self._group.peers[rank]
        if offer.fds:
            _close(offer.fds)
            text = f"the offer of rank {rank} has {len(offer.fds)} descriptors, expected none"
            raise LinkError(text, rank)
        data = parse_offer(rank, bytes(offer.data))
        if side.theirs is not None:
            raise LinkError(f"rank {rank} was attached before", rank)
        try:
            self._askers[rank] = peer.connection.asker(data.address, bytes.fromhex(data.greeting))
        except OSError as error:
            text = f"cannot connect to rank {rank} at {data.address}: {error}"
            if data.address.startswith("unix:") and peer.address is not None:
                text += (
                    f"; rank {rank} was met at {peer.address}, and its engine is asked on its own host "
                    "only: set datadist.nixl.device or LLMConfig.listen_ip_info there"
                )
            raise LinkError(text, rank) from None
        side.their_secret = bytes.fromhex(data.secret)
        side.may_write = data.writable
        side.theirs = Ranges(
            (address, size, Kind((memory, device)))
            for address, size, memory, device in data.regions
        )

    # -- moving ----------------------------------------------------------------------------------

    def read(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> bool:
        """Ask the owner to write; whether something of it has arrived at core."""
        self._move(False, rank, local, remote, length, timeout)
        fd = self._group.peers[rank].control_fd
        if fd is None:
            return True
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        return bool(poller.poll(0))

    def write(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        """Write by NIXL, once the owner has allowed it."""
        self._move(True, rank, local, remote, length, timeout)

    def _move(
        self, write: bool, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        side, asker = self._side(rank), self._askers.get(rank)
        if side.ended is not None:
            raise side.error()
        if asker is None or side.theirs is None:
            raise TransferError(f"this link has no offer of rank {rank} yet")
        if write and not side.may_write:
            raise Unsupported(f"rank {rank} granted read access only")
        cut = self._cut(rank, side.theirs, vector(local), vector(remote), vector(length))
        transfer, moving = Transfer(side, write, cut), self._moving[rank]
        if moving:
            self._forget_settled(rank)
        try:
            moving[transfer] = None
            if side.ended is not None:
                raise side.error()
            asker.run(transfer, timeout)
        except BaseException as error:
            error.in_flight = transfer  # type: ignore[attr-defined]  # at once: see `Transfer.settled`
            try:
                if asker.leave(transfer):
                    moving.pop(transfer, None)
                    error.in_flight = None  # type: ignore[attr-defined]
            except BaseException as other:  # of a signal handler
                other.in_flight = transfer  # type: ignore[attr-defined]
                raise
            raise
        moving.pop(transfer, None)

    def _cut(
        self, rank: int, theirs: Ranges[Kind], local: Vector, remote: Vector, length: Vector
    ) -> list[Piece]:
        try:
            if len(length) == 1:
                theirs.find(int(remote[0]), int(length[0]))
            else:
                theirs.places(remote, length)
        except Outside as error:
            place, size = int(remote[error.index]), length[error.index]
            text = f"{size} bytes at {place:#x} are not memory that rank {rank} offered"
            raise AddressError(text) from None
        try:
            return pieces(local, remote, length, self._local(), theirs)
        except Outside as error:
            place, size = int(local[error.index]), length[error.index]
            text = f"{size} bytes at {place:#x} are not memory that was registered here"
            raise AddressError(text) from None

    def _side(self, rank: int) -> Side:
        side = self._sides.get(rank)
        if side is None:
            raise TransferError(f"rank {rank} is no peer of this link")
        return side

    # -- the end ---------------------------------------------------------------------------------

    def abort(self, rank: int) -> bool:
        """End the side here and now; the thread of the service ends what the peer wanted.

        Returns whether the peer's writes may still touch our memory.
        """
        side = self._sides.get(rank)
        if side is None:
            return False
        self._end_side(side, "the link was aborted")
        self._service.end_soon(side)
        return bool(side.writers)

    def _end_side(self, side: Side, reason: str) -> None:
        asker = self._askers.get(side.rank)
        side.end(reason, lost=asker is not None and not asker.usable)
        for transfer in list(self._moving[side.rank]):
            transfer.end(side.error())

    def force(self, rank: int) -> None:
        """Destroy the agents through which it goes on; of writes the owner has to confirm the end."""
        side, asker = self._side(rank), self._askers.get(rank)
        self.abort(rank)
        transfers = list(self._moving[rank])
        if asker is not None and transfers:
            asker.force(side, transfers)
        self._forget_settled(rank)

    def _forget_settled(self, rank: int) -> None:
        for transfer in list(self._moving[rank]):
            if transfer.ended and transfer.settled():
                self._moving[rank].pop(transfer, None)

    def close(self) -> frozenset[int]:
        """End all sides. Names ranks whose writes could not be ended in time: that should not be."""
        sides = list(self._sides.values())
        for side in sides:
            self._end_side(side, "the link is closed")
        if self._closed:
            return frozenset(side.rank for side in sides if side.writers)

        def end() -> None:
            for side in sides:
                self._service.sides.pop(side.secret, None)
            self._service.end_sides(sides)

        self._service.ask(end, CLOSE_SECONDS)
        for side in sides:
            self._end_reads(side)
        self._closed = True  # at last: what a signal handler has interrupted is done again
        return frozenset(side.rank for side in sides if side.writers and side.writable)

    def _end_reads(self, side: Side) -> None:
        """Nothing of our reads lands afterwards; writes may be in flight, and say so."""
        asker = self._askers.get(side.rank)
        reads = [each for each in list(self._moving[side.rank]) if not each.write]
        if asker is not None and not all(each.settled() for each in reads):
            try:
                asker.force(side, reads)
            except TransferError:
                return  # they are in flight, and say so


def _close(fds: Sequence[int]) -> None:
    """Descriptors that an offer should not have."""
    try:
        close_elsewhere(fds)
    except RuntimeError as error:
        raise LinkError(f"descriptors of an offer stay open: {error}") from None

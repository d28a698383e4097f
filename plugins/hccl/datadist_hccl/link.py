"""One communication domain over HCCL."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datadist.base.texts import in_seconds
from datadist.base.threads import start
from datadist.transport import (
    Access,
    AddressError,
    Group,
    Link,
    LinkError,
    Offer,
    PeerLost,
    Placement,
    RankTable,
    TransferError,
    TransferTimeout,
    TransportOptions,
    Unsupported,
)
from datadist_hccl import abi, blobs
from datadist_hccl.acl import AclError, Device
from datadist_hccl.communicator import Closed, Communicator
from datadist_hccl.flight import Flight
from datadist_hccl.memory import HcclRegion
from datadist_hccl.offer import OFFER_VERSION, OfferData, RegionOffer, parse_offer
from datadist_hccl.one_sided import HcclError
from datadist_hccl.path import Path, explain, gone
from datadist_hccl.resource import Resource, merge
from datadist_hccl.segments import ITEM_BYTES, Outside, Segments, Windows, items, pieces
from datadist_hccl.staging import Staging

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger("datadist.hccl")

CLOSE_SECONDS = 2.0
SETTLE_PAUSE = 0.002
"""Seconds between two looks whether an earlier transfer has settled."""
QUEUED_ITEMS = 4 * abi.MAX_BATCH
"""Items on a stream before it is waited for, so that its queue never fills up."""


FindRdmaRanks = Callable[[RankTable], "dict[int, bool]"]


@dataclass(frozen=True)
class _TransferRequest:
    """One transfer: with whom, in which direction, whether by the staging buffer, and by when."""

    path: Path
    rank: int
    write: bool
    staged: bool
    deadline: float
    timeout: float


class HcclLink(Link):
    """See :class:`datadist.transport.Link`."""

    def __init__(
        self, group: Group, regions: Sequence[HcclRegion], access: Access, device: Device,
        communicator: Communicator, staging: Staging, find_rdma_ranks: FindRdmaRanks,
        resource: Resource | None, options: TransportOptions,
    ) -> None:  # fmt: skip
        """``find_rdma_ranks`` checks a rank table and tells which ranks it connects by RDMA.

        ``resource`` is ours where the group has no table.
        """
        self._group = group
        self._regions = regions
        self._access = access
        self._device = device
        self._communicator = communicator
        self._staging = staging
        self._find_rdma_ranks = find_rdma_ranks
        self._resource = resource
        self._options = options
        self._windows = Windows((region.address, region.size) for region in regions)
        self._paths = {r: Path(peer) for r, peer in group.peers.items() if r != group.rank}
        self._joined = False
        self._ruined: str | None = None
        """Why the communicator was destroyed before the link was closed."""
        if group.table is not None:
            self._settle(group.table)

    def _settle(self, table: RankTable) -> None:
        for rank, rdma in self._find_rdma_ranks(table).items():
            self._paths[rank].rdma = rdma
            self._paths[rank].settle()

    # -- setting up --------------------------------------------------------------------------

    def offer(self, rank: int) -> Offer:
        """The addresses of our regions, so that the peer can check ranges before a transfer."""
        regions = [
            RegionOffer(address=region.address, size=region.size, placement=int(region.placement))
            for region in self._regions
        ]
        writable = self._access is Access.READ_WRITE
        data = OfferData(
            version=OFFER_VERSION, writable=writable, regions=regions, resource=self._resource
        )
        return Offer(data.model_dump_json().encode())

    def attach(self, rank: int, offer: Offer) -> None:
        """Note where the peer's regions lie; over HCCS only those of its device are reachable."""
        path = self._path(rank)
        data = parse_offer(rank, offer)
        if path.offered is not None:
            raise LinkError(f"rank {rank} was attached before", rank)
        path.writable = data.writable
        path.offered = data
        path.settle()

    def join(self, timeout: float) -> None:
        """Make the communicator and meet all peers inside HCCL."""
        deadline = min(self._group.deadline, time.monotonic() + timeout)
        table = self._group.table or self._merged_table()

        def unwanted() -> bool:
            return any(path.aborted for path in self._paths.values())

        def meet(_handle: int) -> None:
            self._communicator.create(
                table.canonical, self._group.rank, [*self._regions, self._staging.region],
                self._options.traffic_class, self._options.service_level, deadline, unwanted,
            )  # fmt: skip
            for path in self._paths.values():
                path.stream = self._communicator.create_stream()
            self._communicator.prepare(deadline, self._options.retry_count, unwanted)

        try:
            self._communicator.use(meet)
        except Closed:
            raise LinkError("the link was closed or aborted meanwhile") from None
        except AclError as error:
            raise LinkError(f"the device cannot serve another link: {error}") from error
        self._joined = True

    def _merged_table(self) -> RankTable:
        """The table that the offers of all ranks make; the same everywhere."""
        assert self._resource is not None
        resources = {self._group.rank: self._resource}
        for rank, path in self._paths.items():
            if path.offered is None or path.offered.resource is None:
                raise LinkError(f"rank {rank} has a rank table, this rank has none", rank)
            resources[rank] = path.offered.resource
        table = merge(resources)
        self._settle(table)
        return table

    def exchange(self, data: bytes) -> list[bytes]:
        """Swap a blob with every rank by HCCL's exchange of descriptors; after :meth:`join`.

        At most :data:`blobs.MAX_BYTES` bytes. A peer that does not answer is waited for as long as
        HCCL_CONNECT_TIMEOUT says (120 s): the library has no other limit there.
        """
        received, rank = {self._group.rank: data}, -1

        def swap(handle: int) -> None:
            nonlocal rank
            for rank in sorted(self._paths):
                seconds = max(1, int(self._group.remaining()))
                received[rank] = blobs.swap(
                    self._communicator.hccl, handle, self._group.rank, rank, data, seconds
                )

        try:
            self._communicator.use(swap)
        except Closed:
            raise LinkError("the link was closed meanwhile") from None
        except AclError as error:
            raise LinkError(f"the device cannot be used: {error}") from error
        except HcclError as error:
            raise LinkError(
                f"HCCL did not exchange data with rank {rank}: {error}", rank
            ) from error
        return [received[rank] for rank in sorted(received)]

    def _path(self, rank: int) -> Path:
        try:
            return self._paths[rank]
        except KeyError:
            raise LinkError(f"rank {rank} is no peer of this link", rank) from None

    # -- moving ------------------------------------------------------------------------------

    def read(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        """Batches of HcclBatchGet on the peer's stream, then a timed wait for it."""
        self._transfer(rank, False, local, remote, length, timeout)

    def write(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        """Batches of HcclBatchPut, if the peer granted write access."""
        path = self._path(rank)
        if path.windows is not None and not path.writable:
            raise Unsupported(f"rank {rank} granted read access only")
        self._transfer(rank, True, local, remote, length, timeout)

    def _transfer(
        self, rank: int, write: bool, local: Buffer, remote: Buffer, length: Buffer,
        timeout: float,
    ) -> None:  # fmt: skip
        deadline = time.monotonic() + timeout
        path = self._path(rank)
        segments, staged = self._pieces(path, rank, local, remote, length)
        request = _TransferRequest(path, rank, write, staged, deadline, timeout)
        if not staged:
            self._run(request, lambda handle: self._move(request, handle, segments))
            return
        self._wait_settled(request)  # before the buffer is taken, which others need
        self._staging.use(
            deadline,
            lambda: self._run(request, lambda handle: self._move_staged(request, handle, segments)),
        )

    def _run(self, request: _TransferRequest, work: Callable[[int], None]) -> None:
        def move(handle: int) -> None:
            try:
                self._begin(request.path, request.rank)
                self._wait_settled(request)
                self._work(request, work, handle)
            finally:
                request.path.moving = False

        try:
            self._communicator.use(move)
        except Closed:
            raise TransferError(self._ruined or "this link is closed") from None
        except AclError as error:
            raise TransferError(str(error)) from error
        finally:
            if self._ruined is not None:
                self._give_up()

    def _work(self, request: _TransferRequest, work: Callable[[int], None], handle: int) -> None:
        try:
            work(handle)
        except TransferError:
            raise
        except BaseException:  # such as what a signal handler raises: nothing may go on
            self._stop_queued(request.path)
            raise

    def _give_up(self) -> None:
        """Destroy the communicator, for all ranks, before a failed transfer is reported."""
        for rank in self._paths:
            self.abort(rank)
        if not self._communicator.close(CLOSE_SECONDS):
            log.error("%s: %s, but HCCL does not let go", self._group.name, self._ruined)

    def _pieces(
        self, path: Path, rank: int, local: Buffer, remote: Buffer, length: Buffer
    ) -> tuple[Segments, bool]:
        """The pieces to move, and whether the link does not expose some of their local memory."""
        if not self._joined or path.windows is None:
            raise TransferError(f"this link has not met rank {rank} yet")
        for windows in (self._windows, None):
            everywhere = windows or self._staging.memory.windows(*Placement)
            try:
                return pieces(local, remote, length, everywhere, path.windows), windows is None
            except Outside as error:
                if windows is None or not error.local:
                    raise AddressError(explain(path, rank, error)) from None
        raise AssertionError("unreachable")

    def _begin(self, path: Path, rank: int) -> None:
        with path.lock:
            if path.aborted:
                raise TransferError(f"the link to rank {rank} was aborted")
            if path.broken is not None:
                raise TransferError(path.broken)
            if gone(path.peer):
                raise PeerLost(f"the process of rank {rank} has ended", rank)
            path.moving = True

    @staticmethod
    def _wait_settled(request: _TransferRequest) -> None:
        """Wait for an earlier transfer that goes on.

        Streams to one rank share the connection, and its fence: the end of the one could be taken for
        that of the other.
        """
        path = request.path
        while path.flight is not None and not path.flight.settled():
            if path.aborted:
                raise TransferError("the link was closed or aborted meanwhile")
            if time.monotonic() >= request.deadline:
                raise TransferTimeout(
                    f"an earlier transfer with rank {request.rank} is still in flight",
                    link_usable=True,
                )
            time.sleep(SETTLE_PAUSE)
        path.flight = None

    def _move(self, request: _TransferRequest, handle: int, segments: Segments) -> None:
        path, rank, hccl = request.path, request.rank, self._communicator.hccl
        table = items(*segments)
        base, count = table.ctypes.data, len(table)
        for first in range(0, count, abi.MAX_BATCH):
            size = min(abi.MAX_BATCH, count - first)
            try:
                hccl.batch(
                    request.write, handle, rank, base + first * ITEM_BYTES, size, path.stream
                )
            except HcclError as error:
                path.broken = f"HCCL refused a batch for rank {rank}: {error}"
                self._stop_queued(path)
                raise TransferError(path.broken) from error
            end = first + size
            if end == count or end % QUEUED_ITEMS == 0:
                self._wait(request)

    def _move_staged(self, request: _TransferRequest, handle: int, segments: Segments) -> None:
        copy = self._staging.memory.copy
        for local, staged, remote, length in self._staging.rounds(*segments):
            if request.write:
                copy(staged, local, length)
            self._move(request, handle, (staged, remote, length))
            if not request.write:
                copy(local, staged, length)

    def _wait(self, request: _TransferRequest) -> None:
        path, rank = request.path, request.rank
        runtime, code = self._device.runtime, abi.ACL_STREAM_ABORT
        if not path.aborted:
            code = runtime.synchronize(path.stream, request.deadline - time.monotonic())
        if code == abi.ACL_SUCCESS and not path.aborted:
            return
        text = f"{code} ({abi.ACL_NAMES.get(code, 'unknown error')}){runtime.recent()}"
        if code == abi.ACL_STREAM_TIMEOUT and not path.aborted:
            raise self._late(request)
        path.broken = f"the link to rank {rank} broke: {text}"
        self._stop_queued(path)
        if code in abi.ACL_PEER_SUSPECT or gone(path.peer):
            raise PeerLost(f"rank {rank} does not answer: {text}", rank)
        if path.aborted:
            raise TransferError("the link was closed or aborted meanwhile")
        raise TransferError(path.broken)

    def _late(self, request: _TransferRequest) -> TransferTimeout:
        """The error of a transfer that is late, which was stopped where that costs no link.

        Over RDMA it goes on, unless it uses the staging buffer, which others need.
        """
        path, text = request.path, f"not complete after {in_seconds(request.timeout)}"
        if not path.rdma or request.staged or gone(path.peer):
            return TransferTimeout(text, link_usable=self._stop_queued(path))
        error = TransferTimeout(text, link_usable=True)
        path.flight = Flight(self._device.runtime, self._communicator, path.stream)
        error.in_flight = path.flight
        return error

    def _stop_queued(self, path: Path) -> bool:
        """Stop all queued operations; returns whether the path stays usable.

        Over HCCS a new stream is enough. Over RDMA the network device may have the requests
        already. Then only the end of the communicator stops them, unless their target is dead.
        """
        if path.rdma and not gone(path.peer):
            self._ruined = (
                "a transfer over RDMA did not end in order, and only the end of the link stopped it"
            )
        with path.stream_lock:
            stream, path.stream = path.stream, 0
            try:
                self._communicator.destroy_stream(stream)
                path.stream = self._communicator.create_stream()
            except AclError as error:
                path.broken = f"the stream cannot be replaced: {error}"
                if error.call == "aclrtStreamAbort":
                    self._ruined = f"a transfer cannot be stopped: {error}"
        return path.broken is None and self._ruined is None

    # -- the end -----------------------------------------------------------------------------

    def abort(self, rank: int) -> None:
        """Refuse further operations; stop the stream of one in flight, on a thread of its own."""
        path = self._paths.get(rank)
        if path is None:
            return
        with path.lock:
            path.aborted = True
            moving = path.moving
        if moving:
            try:
                start(
                    threading.Thread(
                        target=self._stop, args=(path,), name="datadist-hccl-abort", daemon=True
                    )
                )
            except RuntimeError as error:
                log.warning("the transfer with rank %d ends at its deadline: %s", rank, error)

    def _stop(self, path: Path) -> None:
        def stop(_handle: int) -> None:
            with path.stream_lock:
                if path.moving and path.stream:
                    self._device.runtime.call("aclrtStreamAbort", path.stream)

        try:
            self._communicator.use(stop)
        except Closed:
            pass
        except AclError as error:
            log.error("cannot abort the transfer with rank %d: %s", path.peer.rank, error)

    def force(self, rank: int) -> None:
        """End a transfer that goes on with the communicator, and so the whole link."""
        path = self._path(rank)
        self.abort(rank)
        if path.flight is not None and not path.flight.settled():
            self._ruined = (
                "a transfer over RDMA did not end, and only the end of the link stopped it"
            )
            self._give_up()

    def close(self) -> frozenset[int]:
        """Stop everything, destroy the communicator and take the memory away from peers.

        What cannot be destroyed yet, because a call of the library has not come back, is destroyed
        when it does; the memory is kept until then. Ranks are returned if that is so, or if HCCL
        still knows memory that they could write, because other links expose it.
        """
        for rank in self._paths:
            self.abort(rank)
        ended = self._communicator.close(CLOSE_SECONDS)
        if not ended:
            log.error(
                "%s: HCCL did not let go of the link in %s; its memory is kept until it does",
                self._group.name, in_seconds(CLOSE_SECONDS),
            )  # fmt: skip
        shared = any(region in self._regions for region in self._communicator.shared)
        if self._access is Access.READ or (ended and not shared):
            return frozenset()
        return frozenset(
            rank
            for rank, path in self._paths.items()
            if not (ended and path.rdma) and not gone(path.peer)
        )

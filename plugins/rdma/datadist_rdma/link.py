"""One communication domain over RDMA: a reliable connection to every other rank."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from datadist.base.texts import in_seconds
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
from datadist_rdma import verbs
from datadist_rdma.chains import (
    DEPTH,
    MAX_SHORT_CHAIN,
    PIECE,
    Chain,
    chain_length,
    chains,
    segments,
    short_chain,
)
from datadist_rdma.device import Device
from datadist_rdma.memory import Outside, Ranges, RdmaRegion, Vector
from datadist_rdma.offer import OfferData, RegionOffer, make_offer, parse_offer
from datadist_rdma.options import Options
from datadist_rdma.ports import Gid
from datadist_rdma.queue_pair import ConnectionSettings, End, QueuePair
from datadist_rdma.transfer import Transfer

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger("datadist.rdma")

CLOSE_SECONDS = 5.0

Numbers = Sequence[int] | Vector


class _Path:
    """Our connection to one peer."""

    def __init__(self, device: Device, gid: Gid, pair: QueuePair) -> None:
        self.device = device
        self.gid = gid
        self.pair = pair
        self.remote: Ranges | None = None
        """The memory of the peer that we may access; None until its offer was attached."""
        self.writable = False
        self.aborted = False
        self.broken: str | None = None

    def abort(self) -> None:
        """Abort the transfer in flight; the thread of the transfer does the work."""
        self.aborted = True
        self.pair.notified.set()


class RdmaLink(Link):
    """See :class:`datadist.transport.Link`; ``local`` gives all our memory with its keys on a device."""

    def __init__(
        self,
        local: Callable[[Device], Ranges],
        group: Group,
        places: Mapping[int, tuple[Device, Gid]],
        regions: Sequence[RdmaRegion],
        access: Access,
        options: Options,
    ) -> None:
        self._local = local
        self._group = group
        self._regions = regions
        self._access = access
        self._options = options
        self._paths: dict[int, _Path] = {}
        self._idle = threading.Condition()
        self._busy = 0
        self._closed = False
        try:
            for rank, (device, gid) in places.items():
                pair = QueuePair(device, gid, peers_may_write=access is Access.READ_WRITE)
                self._paths[rank] = _Path(device, gid, pair)
        except BaseException:
            self.close()
            raise

    # -- setting up --------------------------------------------------------------------------

    def offer(self, rank: int) -> Offer:
        """Our end of the connection, and the keys of what the peer may reach."""
        path = self._path(rank)
        regions = [
            RegionOffer(address=r.address, size=r.size, key=r.keys(path.device)[1])
            for r in self._regions
        ]
        return Offer(make_offer(path.pair.end, self._access is Access.READ_WRITE, regions))

    def attach(self, rank: int, offer: Offer) -> None:
        """Connect with the peer's end; takes one second if the network does not find the peer."""
        path = self._path(rank)
        data = parse_offer(rank, offer.data)
        if path.remote is not None:
            raise LinkError(f"rank {rank} was attached before", rank)
        try:
            self._enter()
        except TransferError as error:
            raise LinkError(str(error), rank) from None
        try:
            mtu = self._connect(rank, path, data.end)
            path.writable = data.writable
            path.remote = Ranges((r.address, r.size, r.key) for r in data.regions)
        finally:
            self._leave()
        self._tell(rank, path, data, mtu)

    def _connect(self, rank: int, path: _Path, peer: End) -> int:
        if _is_ipv4(peer.gid) != _is_ipv4(path.gid.raw):
            raise LinkError(
                f"rank {rank} uses {_address(peer.gid)} and we {path.gid.address}: both must be IPv4, "
                "or both IPv6; set device_ip in the rank table, or the options device and gid_index",
                rank,
            )
        options = self._options
        settings = ConnectionSettings(
            options.traffic_class, options.service_level, options.timeout, options.retry_count
        )
        for left in reversed(range(options.attempts)):
            try:
                return path.pair.connect(peer, settings)
            except LinkError as error:
                silent = getattr(error, "errno", None) == errno.ETIMEDOUT
                if not (silent and left) or path.aborted:
                    raise LinkError(
                        f"cannot connect to rank {rank} at {_address(peer.gid)}: {error}", rank
                    ) from error
        raise AssertionError("at least one attempt")

    def _tell(self, rank: int, path: _Path, data: OfferData, mtu: int) -> None:
        log.info(
            "link %s to rank %d: %s port %d GID %d (%s) to %s, MTU %d, traffic class %d, service "
            "level %d",
            self._group.name, rank, path.gid.device, path.gid.port, path.gid.index,
            path.gid.address, _address(data.end.gid), 128 << mtu, self._options.traffic_class,
            self._options.service_level,
        )  # fmt: skip

    # -- moving ------------------------------------------------------------------------------

    def read(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        """RDMA reads of all segments."""
        self._transfer(rank, verbs.WR_RDMA_READ, local, remote, length, timeout)

    def write(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        """RDMA writes of all segments; complete when the peer's adapter has them."""
        path = self._path(rank)
        if path.remote is not None and not path.writable:
            raise Unsupported(f"rank {rank} granted read access only")
        self._transfer(rank, verbs.WR_RDMA_WRITE, local, remote, length, timeout)

    def _transfer(
        self, rank: int, opcode: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        path = self._path(rank)
        if path.remote is None:
            raise TransferError(f"this link has no offer of rank {rank} yet")
        self._enter()
        try:
            if path.aborted:
                raise TransferError(f"the link to rank {rank} was aborted")
            if path.broken is not None:
                raise TransferError(path.broken)
            deadline = time.monotonic() + timeout
            planned, window = self._plan(rank, path, path.remote, opcode, (local, remote, length))
            self._run(
                path, Transfer(path.pair, rank, window, lambda: path.aborted), planned, deadline
            )
        finally:
            self._leave()

    @staticmethod
    def _run(path: _Path, transfer: Transfer, planned: Iterable[Chain], deadline: float) -> None:
        """Run a transfer. After any error except a harmless timeout the connection has ended."""
        try:
            transfer.run(planned, deadline)
        except BaseException as error:
            if not (isinstance(error, TransferError) and error.link_usable):
                reason = str(error) or type(error).__name__
                path.broken = f"an earlier transfer ended with: {reason}"
            raise

    def _plan(
        self,
        rank: int,
        path: _Path,
        remote: Ranges,
        opcode: int,
        vectors: tuple[Buffer, Buffer, Buffer],
    ) -> tuple[Iterator[Chain], int]:
        """The chains of a transfer, and how many requests may be in flight."""
        piece = min(PIECE, path.pair.max_message)
        own = self._local(path.device)
        if memoryview(vectors[0]).nbytes <= 8 * MAX_SHORT_CHAIN:
            rows = [memoryview(vector).cast("B").cast("q").tolist() for vector in vectors]
            if max(rows[2]) <= piece:
                parts = []
                for here, there, size in zip(*rows, strict=True):
                    with _outside_of_offer(rank, [there], [size]):
                        rkey = remote.key(there, size)
                    with _outside_of_own([here], [size]):
                        parts.append((here, there, size, own.key(here, size), rkey))
                return short_chain(parts, opcode), MAX_SHORT_CHAIN
        split = segments(*vectors, piece)
        with _outside_of_offer(rank, split.remote, split.length):
            rkeys = remote.keys(split.remote, split.length)
        with _outside_of_own(split.local, split.length):
            lkeys = own.keys(split.local, split.length)
        count = chain_length(int(split.length.max()))
        return chains(split, lkeys, rkeys, opcode, count), min(DEPTH, 4 * count)

    def _path(self, rank: int) -> _Path:
        try:
            return self._paths[rank]
        except KeyError:
            raise LinkError(f"rank {rank} is no peer of this link", rank) from None

    def _enter(self) -> None:
        with self._idle:
            if self._closed:
                raise TransferError("this link is closed")
            self._busy += 1

    def _leave(self) -> None:
        with self._idle:
            self._busy -= 1
            self._idle.notify_all()

    # -- the end -----------------------------------------------------------------------------

    def abort(self, rank: int) -> None:
        """Abort the transfer with the peer, and refuse all further ones."""
        path = self._paths.get(rank)
        if path is not None:
            path.abort()

    def close(self) -> frozenset[int]:
        """Abort, wait for transfers to end, destroy the queue pairs; afterwards no peer can write
        our memory.
        """
        with self._idle:
            if self._closed:
                return frozenset()
            self._closed = True
            for path in self._paths.values():
                path.abort()
            quiet = self._idle.wait_for(lambda: self._busy == 0, CLOSE_SECONDS)
        for path in self._paths.values():
            path.pair.fail()
            if quiet:
                path.pair.close()
        if not quiet:
            log.error(
                "a call did not end within %s: its queue pairs are in the error state, and stay",
                in_seconds(CLOSE_SECONDS),
            )
        return frozenset()


@contextmanager
def _outside_of_offer(rank: int, address: Numbers, length: Numbers) -> Iterator[None]:
    try:
        yield
    except Outside as error:
        raise AddressError(
            f"{length[error.index]} bytes at {address[error.index]:#x} are not memory that rank "
            f"{rank} offered"
        ) from None


@contextmanager
def _outside_of_own(address: Numbers, length: Numbers) -> Iterator[None]:
    try:
        yield
    except Outside as error:
        raise AddressError(
            f"{length[error.index]} bytes at {address[error.index]:#x} are not memory that was "
            "registered here"
        ) from None


def _is_ipv4(gid: bytes) -> bool:
    return gid[:12] == bytes(10) + b"\xff\xff"


def _address(gid: bytes) -> str:
    return str(Gid("", 0, 0, gid, "").address)

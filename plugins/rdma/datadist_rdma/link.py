"""One communication domain over RDMA: a reliable connection to every other rank."""

from __future__ import annotations

import errno
import logging
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
from datadist_rdma.path import UNKNOWN, Call, Path
from datadist_rdma.ports import Gid, address_of
from datadist_rdma.queue_pair import ConnectionSettings, End, QueuePair
from datadist_rdma.transfer import Transfer

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger("datadist.rdma")

CLOSE_SECONDS = 5.0
MIN_AHEAD, MAX_AHEAD = 2, 4
"""Chains in flight: fewer where several transfers run, so that all end soon after a deadline."""

Numbers = Sequence[int] | Vector


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
        self._paths: dict[int, Path] = {}
        self._closed = False
        try:
            for rank, (device, gid) in places.items():
                pairs: list[QueuePair] = []
                self._paths[rank] = Path(rank, device, gid, pairs)
                for _ in range(options.queue_pairs):
                    pairs.append(QueuePair(device, gid, access is Access.READ_WRITE))
        except BaseException:
            self.close()
            raise

    # -- setting up --------------------------------------------------------------------------

    def offer(self, rank: int) -> Offer:
        """Our ends of the connections, and the keys of what the peer may reach."""
        path = self._path(rank)
        regions = [
            RegionOffer(address=r.address, size=r.size, key=r.keys(path.device)[1])
            for r in self._regions
        ]
        ends = [pair.end for pair in path.pairs]
        return Offer(make_offer(ends, self._access is Access.READ_WRITE, regions))

    def attach(self, rank: int, offer: Offer) -> None:
        """Connect with the peer's ends; takes one second if the network does not find the peer."""
        path, call = self._path(rank), Call()
        data = parse_offer(rank, offer.data)
        try:
            if not path.claim(call, path) or path.remote is not None:
                raise LinkError(f"rank {rank} was attached before", rank)
            path.check()
            mtu = self._connect(rank, path, data.ends)
            path.writable = data.writable
            path.remote = Ranges((r.address, r.size, r.key) for r in data.regions)
        except TransferError as error:
            raise LinkError(str(error), rank) from None
        finally:
            if path.users.get(path) is call:
                del path.users[path]
        self._tell(rank, path, data, mtu)

    def _connect(self, rank: int, path: Path, peers: Sequence[End]) -> int:
        """Connect as many queue pairs as both ends have; returns the MTU (enumerated)."""
        gid = peers[0].gid
        if _is_ipv4(gid) != _is_ipv4(path.gid.raw):
            raise LinkError(
                f"rank {rank} uses {address_of(gid)} and we {path.gid.address}: both must be IPv4, "
                "or both IPv6; set device_ip in the rank table, or the options device and gid_index",
                rank,
            )
        path.keep(len(peers))
        mtus = [
            self._connect_pair(path, pair, end)
            for pair, end in zip(path.pairs, peers, strict=False)  # the peer may have more
        ]
        return mtus[0]

    def _connect_pair(self, path: Path, pair: QueuePair, peer: End) -> int:
        options = self._options
        settings = ConnectionSettings(
            options.traffic_class, options.service_level, options.timeout, options.retry_count
        )
        for left in reversed(range(options.attempts)):
            try:
                return pair.connect(peer, settings)
            except LinkError as error:
                silent = getattr(error, "errno", None) == errno.ETIMEDOUT
                if not (silent and left) or path.ended is not None:
                    raise LinkError(
                        f"cannot connect to rank {path.rank} at {address_of(peer.gid)}: {error}",
                        path.rank,
                    ) from error
        raise AssertionError("at least one attempt")

    def _tell(self, rank: int, path: Path, data: OfferData, mtu: int) -> None:
        log.info(
            "link %s to rank %d: %s port %d GID %d (%s) to %s, MTU %d, traffic class %d, service "
            "level %d, %d queue pairs",
            self._group.name, rank, path.gid.device, path.gid.port, path.gid.index,
            path.gid.address, address_of(data.ends[0].gid), 128 << mtu, self._options.traffic_class,
            self._options.service_level, len(path.pairs),
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
        path, call = self._path(rank), Call()
        if path.remote is None:
            raise TransferError(f"this link has no offer of rank {rank} yet")
        deadline = time.monotonic() + timeout
        users = path.users
        try:
            pair = path.take(call, deadline)
            planned, window = self._plan(rank, path, path.remote, opcode, (local, remote, length))
            self._run(path, Transfer(pair, rank, window, lambda: path.ended), planned, deadline)
        finally:
            # Nothing is called here: what a signal handler raises would leave the queue pair taken.
            if call.uses in users and users[call.uses] is call:
                del users[call.uses]

    @staticmethod
    def _run(path: Path, transfer: Transfer, planned: Iterable[Chain], deadline: float) -> None:
        """Run a transfer. Where its queue pair has ended, so have the others."""
        try:
            transfer.run(planned, deadline)
        except BaseException as error:
            if not transfer.usable:
                path.ended = path.ended or UNKNOWN  # calls nothing, see _transfer
                path.end(f"an earlier transfer ended with: {str(error) or type(error).__name__}")
            raise

    def _plan(
        self,
        rank: int,
        path: Path,
        remote: Ranges,
        opcode: int,
        vectors: tuple[Buffer, Buffer, Buffer],
    ) -> tuple[Iterator[Chain], int]:
        """The chains of a transfer, and how many requests may be in flight."""
        piece = min(PIECE, path.pairs[0].max_message)
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
        ahead = max(MIN_AHEAD, MAX_AHEAD // len(path.users))
        return chains(split, lkeys, rkeys, opcode, count), min(DEPTH, ahead * count)

    def _path(self, rank: int) -> Path:
        try:
            return self._paths[rank]
        except KeyError:
            raise LinkError(f"rank {rank} is no peer of this link", rank) from None

    # -- the end -----------------------------------------------------------------------------

    def abort(self, rank: int) -> None:
        """End the transfers with the peer, and refuse all further ones."""
        path = self._paths.get(rank)
        if path is not None:
            path.end(f"the link to rank {rank} was aborted")

    def close(self) -> frozenset[int]:
        """End and await all transfers, destroy the queue pairs; then no peer can write our memory."""
        if self._closed:
            return frozenset()
        self._closed = True
        for path in self._paths.values():
            path.end("this link is closed")
        deadline = time.monotonic() + CLOSE_SECONDS
        busy = [path for path in self._paths.values() if not path.wait_until_unused(deadline)]
        for path in self._paths.values():
            for pair in path.pairs:
                pair.fail()
                if path not in busy:
                    pair.close()
        if busy:
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

"""One communication domain over shared memory."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from datadist.base.pidfds import has_ended
from datadist.base.process_access import REFUSALS, refusal, shows_our_pids, why_refused
from datadist.base.shortage import explain
from datadist.base.texts import in_seconds
from datadist.transport import (
    Access,
    AddressError,
    Group,
    KnownCall,
    KnownWay,
    Link,
    LinkError,
    Offer,
    Peer,
    PeerLost,
    Region,
    RegistrationError,
    TransferError,
    TransferTimeout,
    TransportError,
    Unsupported,
)
from datadist_shm import _native
from datadist_shm._native import transfer
from datadist_shm.fence import PAGE, Fence
from datadist_shm.forking import let_go_in_children
from datadist_shm.known_ways import known_way
from datadist_shm.memory import (
    Mapping,
    PeerFile,
    PeerMapping,
    PeerMappings,
    PoolRegion,
    UserRegion,
    descriptor_for_peer,
)
from datadist_shm.offer import OfferData, RegionOffer, check_descriptor, parse_offer
from datadist_shm.options import Options

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger("datadist.shm")

ABORT, PAGEMAP = 0, 7
"""Places of the abort flag, and of the peer's pagemap, in what native code knows of a path."""
AT_ONCE = 4096
"""Bytes of an offer that are read in some ten microseconds."""
AT_ONCE_FDS = 8
"""Descriptors of an offer that are mapped in some hundred microseconds."""
CLOSE_SECONDS = 2.0
FENCE_SECONDS = 1.0
LOOK_SECONDS = 0.001
"""From one look to the next whether transfers have ended, where a link is closed meanwhile."""
_tokens = itertools.count()

Failure: TypeAlias = "tuple[int, int, int]"
_UNMADE = ": the owner has not made the pages yet that were to be written"


class Unsettled:
    """A transfer that its caller has left; what it may touch stays mapped until it has settled."""

    _all: ClassVar[set[Unsettled]] = set()

    def __init__(self, flight: object, keepers: list[object]) -> None:
        self._flight, self._keepers = flight, keepers
        self._all.add(self)
        let_go_in_children(self)

    @classmethod
    def of(cls, flight: object, keepers: list[object]) -> Unsettled:
        """The one for this transfer, which is made at most once."""
        known = (each for each in tuple(cls._all) if each._flight is flight)
        return next(known, None) or cls(flight, keepers)

    def leave(self) -> None:
        """See :mod:`datadist_shm.forking`."""
        self._keepers = []

    def settled(self) -> bool:
        """See :class:`datadist.transport.InFlight`."""
        if not _native.settled(self._flight):
            return False
        self._keepers = []
        self._all.discard(self)
        return True


class _Path:
    """Our way to one peer: its memory, and whether we may still use it."""

    def __init__(
        self, peer: Peer, options: Options, pagemap: int, pools: Sequence[PoolRegion]
    ) -> None:
        self.peer = peer
        self.lock = threading.Lock()
        """Held while the peer's memory is mapped here, and while the path is closed."""
        self.inside: set[int] = set()
        """Tokens of what moves here. A transfer adds one and then looks whether the path is open; who
        closes it notes that and then waits until nothing is inside. So one of the two sees the other."""
        pidfd = -1 if peer.pidfd is None else peer.pidfd
        control = -1 if peer.control_fd is None else peer.control_fd
        self.native = array(
            "q",
            [
                0, peer.pid or 0, pidfd, control, options.copy_threads, options.kernel_number,
                pagemap, -1,
            ],
        )  # fmt: skip
        """The native description of this path; windows are appended when it is attached."""
        self.native.append(len(pools))
        for pool in pools:
            self.native.extend((pool.address, pool.size))
        self.pools = [pool.keeper for pool in pools]
        self.keepers: list[PeerMapping] = []
        """These two keep memory mapped that a transfer uses: ours, and the peer's."""
        self.writable = False
        self.fence: Mapping | None = None
        self.open = False
        """Whether it was attached and the link is not closed."""
        let_go_in_children(self)

    def ends_by(self, deadline: float) -> bool:
        """Prevent new transfers; whether those that go on have ended by ``deadline``."""
        self.open = False
        while self.inside and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
        return not self.inside

    def leave(self) -> None:
        """See :mod:`datadist_shm.forking`."""
        self.detach()
        self.pools = []

    def detach(self) -> None:
        """Undo what was attached, also in part."""
        self.open = False
        self.keepers, self.fence = [], None
        pagemap, self.native[PAGEMAP] = self.native[PAGEMAP], -1
        if pagemap >= 0:
            os.close(pagemap)

    @property
    def who(self) -> str:
        """The peer, for people."""
        pid = f" (pid {self.peer.pid})" if self.peer.pid else ""
        return f"rank {self.peer.rank}{pid}"


class ShmLink(Link):
    """See :class:`datadist.transport.Link`."""

    def __init__(
        self, group: Group, regions: Sequence[Region], access: Access, mappings: PeerMappings,
        options: Options, pagemap: int,
    ) -> None:  # fmt: skip
        self._group = group
        self._regions = regions
        self._writable = access is Access.READ_WRITE
        self._mappings = mappings
        self._options = options
        pools = [region for region in regions if isinstance(region, PoolRegion)]
        self._paths = {
            r: _Path(peer, options, pagemap, pools)
            for r, peer in group.peers.items()
            if r != group.rank
        }
        self._fences: dict[int, Fence] = {}
        self._closing = threading.Lock()
        self._closed = False
        self._result: frozenset[int] = frozenset()

    # -- setting up --------------------------------------------------------------------------

    def offer(self, rank: int) -> Offer:
        """Descriptors of the pools, addresses of the rest, and a fence where peers may write."""
        fds: list[int] = []
        try:
            regions = [self._offer_region(region, fds) for region in self._regions]
            fence = self._offer_fence(rank, fds) if self._writable else None
            data = OfferData(writable=self._writable, regions=regions, fence=fence)
            return Offer(data.model_dump_json().encode(), fds)
        except BaseException as error:
            for fd in fds:
                os.close(fd)
            if not isinstance(error, OSError):
                raise
            why = explain(error)
            raise LinkError(f"cannot make the offer for rank {rank}: {why}", rank) from error

    def _offer_region(self, region: Region, fds: list[int]) -> RegionOffer:
        assert isinstance(region, (PoolRegion, UserRegion))
        place = None
        if isinstance(region, PoolRegion):
            place = len(fds)
            fds.append(descriptor_for_peer(region, self._writable))
        return RegionOffer(id=region.region_id, address=region.address, size=region.size, fd=place)

    def _offer_fence(self, rank: int, fds: list[int]) -> int:
        fence = self._fences[rank] = Fence()
        fds.append(fence.take_fd())
        return len(fds) - 1

    def attach(self, rank: int, offer: Offer) -> None:
        """Map the peer's pools, once for all links, and note where the rest of its memory lies."""
        path = self._paths[rank]
        try:
            data = parse_offer(rank, offer.data, len(offer.fds))
            with path.lock:
                if self._closed or path.open:
                    state = "this link is closed" if self._closed else "it was attached before"
                    raise LinkError(f"cannot attach rank {rank}: {state}", rank)
                path.detach()  # what an attempt to do it at once has left
                try:
                    self._attach(rank, path, data, offer.fds)
                    path.open = True
                finally:
                    closed = self._closed
                    if closed and path.ends_by(time.monotonic() + CLOSE_SECONDS):
                        path.leave()  # `close` did not wait for so long
                if closed:
                    raise LinkError(f"cannot attach rank {rank}: this link was closed", rank)
        except OSError as error:
            why = explain(error)
            raise LinkError(f"cannot map the memory of rank {rank}: {why}", rank) from error
        finally:
            for fd in offer.fds:
                os.close(fd)
        self._check_filling()

    def attach_at_once(self, rank: int, offer: Offer) -> bool:
        """Small offers of nothing but pools: a process may keep us waiting who looks at its memory.

        What was mapped of one that is not taken is left to :meth:`attach` and :meth:`close`, since to
        undo that may take longer.
        """
        path = self._paths[rank]
        small = len(offer.data) <= AT_ONCE and len(offer.fds) <= AT_ONCE_FDS
        if not small or not path.lock.acquire(blocking=False):
            return False
        try:
            return self._try_to_attach(rank, path, offer)
        finally:
            path.lock.release()

    def _try_to_attach(self, rank: int, path: _Path, offer: Offer) -> bool:
        """Whether the offer was taken; if not, :meth:`attach` tells why it cannot be."""
        if self._closed or path.open:
            return False
        try:
            data = parse_offer(rank, offer.data, len(offer.fds))
            if any(region.fd is None for region in data.regions):
                return False
            self._check_filling()
            self._attach(rank, path, data, offer.fds)
        except (LinkError, OSError, MemoryError) as error:
            log.debug("rank %d is attached by a worker: %s", rank, error)
            return False
        path.open = True
        for fd in offer.fds:  # each of memory that is mapped here, so that this frees nothing
            os.close(fd)
        return True

    def _attach(self, rank: int, path: _Path, data: OfferData, fds: Sequence[int]) -> None:
        windows = [
            (region.address, region.size, *self._map(rank, path, data.writable, region, fds))
            for region in data.regions
        ]
        if data.fence is not None:
            check_descriptor(rank, fds[data.fence], PAGE)
            path.fence = Mapping(fds[data.fence], PAGE, writable=True)
            if os.fstat(fds[data.fence]).st_blocks == 0:
                raise LinkError(f"rank {rank} offers a fence without memory", rank)
        if any(region.fd is None for region in data.regions):
            self._try_registered(rank, path, data)
            path.native[PAGEMAP] = _open_pagemap(path.peer)
        path.native.extend(number for window in sorted(windows) for number in window)
        path.writable = data.writable

    def _try_registered(self, rank: int, path: _Path, data: OfferData) -> None:
        """Warn where registered memory of the peer cannot be reached, before a transfer needs it.

        Raises LinkError where it has no other memory.
        """
        why = refusal(path.peer.pid)
        what = "cannot be reached"
        if why is None and data.writable:
            why, what = refusal(path.peer.pid, write=True), "can be read, but not written"
        elif why is not None and all(region.fd is None for region in data.regions):
            raise LinkError(f"no memory of {path.who} can be reached: {why}", rank)
        if why is not None:
            name = self._group.name.rpartition(".")[0] or self._group.name
            log.warning("link %r: registered memory of %s %s: %s", name, path.who, what, why)

    def _check_filling(self) -> None:
        """Refuse to link over a pool whose pages cannot be had; those that come later are waited for by
        who writes, and read as zeros."""
        for region in self._regions:
            if isinstance(region, PoolRegion):
                try:
                    region.check_filling()
                except RegistrationError as error:
                    raise LinkError(str(error)) from error

    def _map(
        self, rank: int, path: _Path, writable: bool, region: RegionOffer, fds: Sequence[int]
    ) -> tuple[int, int]:
        """Where a region is mapped here, and its pages; 0 for what is reached through the process."""
        if region.fd is None:
            return 0, 0
        fd = fds[region.fd]
        file = check_descriptor(rank, fd, region.size)
        key = (path.peer.incarnation, region.id, writable)
        mapping = self._mappings.take(key, lambda: self._map_anew(fd, file, region, writable))
        path.keepers.append(mapping)
        if mapping.file != file:
            raise LinkError(f"rank {rank} changed the memory of region {region.id}", rank)
        return mapping.address, mapping.pages

    def _map_anew(
        self, fd: int, file: PeerFile, region: RegionOffer, writable: bool
    ) -> PeerMapping:
        huge, search = self._options.huge_pages != "0", self._options.populate
        return PeerMapping(fd, region.size, writable, huge, file, search)

    # -- moving ------------------------------------------------------------------------------

    def read(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> bool:
        """Copy from the peer; checked, chunked, and without the GIL but for a few bytes."""
        path = self._paths.get(rank) or self._path(rank)
        token, flights = next(_tokens), []  # type: ignore[var-annotated]
        try:
            path.inside.add(token)
            if not path.open:
                raise self._not_open(rank)
            answer = transfer(False, path.native, local, remote, length, 0, timeout, flights)
            if type(answer) is tuple:
                raise _error(path, answer, remote, length, timeout, write=False)
            return answer  # type: ignore[return-value]
        except BaseException as error:
            if flights:
                try:
                    _note_flight(error, flights[0], path)
                except BaseException:  # a handler of a signal: once more, which does no harm
                    _note_flight(error, flights[0], path)
                    raise
            raise
        finally:
            path.inside.discard(token)

    def write(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        """Copy to the peer, where it granted that."""
        path = self._path(rank)
        token, flights = next(_tokens), []  # type: ignore[var-annotated]
        try:
            path.inside.add(token)
            if not path.open:
                raise self._not_open(rank)
            if path.fence is None:
                raise Unsupported(f"rank {rank} granted read access only")
            fence = path.fence.address
            answer = transfer(True, path.native, local, remote, length, fence, timeout, flights)
            if isinstance(answer, tuple):
                raise _error(path, answer, remote, length, timeout, write=True)
        except BaseException as error:
            if flights:
                try:
                    _note_flight(error, flights[0], path)
                except BaseException:  # a handler of a signal: once more, which does no harm
                    _note_flight(error, flights[0], path)
                    raise
            raise
        finally:
            path.inside.discard(token)

    def known_way(self, way: KnownWay) -> KnownCall | None:
        """See :mod:`datadist_shm.known_ways`."""
        path = self._paths[way.rank]
        fence = path.fence
        if not path.open or (way.write and fence is None):
            return None
        address = fence.address if way.write and fence is not None else 0
        return known_way(way, path.native, address, ((path, "open", True),))

    def _path(self, rank: int) -> _Path:
        try:
            return self._paths[rank]
        except KeyError:
            raise LinkError(f"rank {rank} is no peer of this link", rank) from None

    def _not_open(self, rank: int) -> TransferError:
        state = "is closed" if self._closed else f"has no offer of rank {rank} yet"
        return TransferError(f"this link {state}")

    # -- the end -----------------------------------------------------------------------------

    def abort(self, rank: int) -> None:
        """Stop what is in flight with the peer at its next chunk, and all that would follow."""
        path = self._paths.get(rank)
        if path is not None:
            path.native[ABORT] = 1
        fence = self._fences.get(rank)
        if fence is not None:
            fence.revoke()

    def close(self) -> frozenset[int]:
        """Abort, revoke, wait a bounded time, unmap; see the interface."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._result = self._close()
        return self._result

    def _close(self) -> frozenset[int]:
        for rank in self._paths:
            self.abort(rank)
        deadline = time.monotonic() + CLOSE_SECONDS
        ended = [path for path in self._paths.values() if _stop_new_transfers(path, deadline)]
        if len(ended) < len(self._paths):
            log.error(
                "what is in flight did not end within %s: its mappings stay",
                in_seconds(CLOSE_SECONDS),
            )
        possible_writers = self._revoke()
        for path in ended:
            path.leave()
        return possible_writers

    def _revoke(self) -> frozenset[int]:
        """Ranks that may still be writing our memory."""
        for fence in self._fences.values():
            fence.revoke()
        deadline = time.monotonic() + FENCE_SECONDS
        late = [
            rank
            for rank, fence in self._fences.items()
            if not _gone(self._paths[rank].peer) and not fence.wait_until_empty(deadline)
        ]
        self._fences.clear()
        return frozenset(rank for rank in late if not _gone(self._paths[rank].peer))


def _open_pagemap(peer: Peer) -> int:
    """The descriptor that tells which pages of a peer exist; -1 where the system does not permit it."""
    if not peer.pid or not shows_our_pids():
        return -1
    with contextlib.suppress(OSError):
        fd = os.open(f"/proc/{peer.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        if not _gone(peer):  # so that it is not another process's
            return fd
        os.close(fd)
    return -1


def _stop_new_transfers(path: _Path, deadline: float) -> bool:
    """Prevent new transfers and wait for running ones; False if one has not ended by ``deadline``."""
    if not path.lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
        return False
    try:
        return path.ends_by(deadline)
    finally:
        path.lock.release()


def _note_flight(error: BaseException, flight: object, path: _Path) -> None:
    """Let an exception say what goes on, also one of the caller's; while the path is not closed."""
    error.in_flight = Unsettled.of(flight, [*path.pools, *path.keepers, path.fence])  # type: ignore[attr-defined]


def _gone(peer: Peer) -> bool:
    return peer.pidfd is not None and has_ended(peer.pidfd)


def _error(
    path: _Path, failure: Failure, remote: Buffer, length: Buffer, timeout: float, write: bool
) -> TransportError:
    code, index, error = failure
    rank = path.peer.rank
    address, size = (memoryview(b).cast("B").cast("q")[index] for b in (remote, length))
    makers: dict[int, Callable[[], TransportError]] = {
        _native.BAD_ADDRESS: lambda: AddressError(
            f"{size} bytes at {address:#x} are not memory that rank {rank} offered, or are not "
            "mapped any more"
        ),
        _native.TIMED_OUT: lambda: TransferTimeout(
            f"not complete after {in_seconds(timeout)}{_UNMADE if error == errno.ENODATA else ''}",
            link_usable=True,
        ),
        _native.ABORTED: lambda: TransferError("the link was closed or aborted meanwhile"),
        _native.PEER_GONE: lambda: PeerLost(f"the process of rank {rank} has ended", rank),
        _native.REVOKED: lambda: TransferError(f"rank {rank} has unlinked"),
    }
    if code in makers:
        return makers[code]()
    if error in (*REFUSALS, errno.EXDEV):
        memory, why = "registered memory", why_refused(path.peer.pid, error, write)
    else:
        memory, why = "memory", explain(OSError(error, os.strerror(error)))
    return TransferError(f"cannot reach the {memory} of {path.who}: {why}", link_usable=True)

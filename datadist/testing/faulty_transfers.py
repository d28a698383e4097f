"""Faulty transports whose fault shows late, under load, or when something else fails too.

See :mod:`datadist.testing.faulty_transports`; :data:`FAULTY_TRANSFERS` lists them with their tests.
"""

from __future__ import annotations

import ctypes
import os
import random
import select
import signal
import sys
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from datadist.testing.faulty_transports import FaultyReference, FaultyTransport
from datadist.testing.reference import LIBC, ReferenceLink
from datadist.transport import (
    Access,
    Capabilities,
    Group,
    Peer,
    PeerLost,
    Region,
    TransferError,
    TransferTimeout,
    TransportOptions,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["FAULTY_TRANSFERS"]

LATE = 0.4
"""Seconds after which a late piece lands."""
PIECE = 4096


def _after(seconds: float, call: Callable[[], object]) -> None:
    thread = threading.Timer(seconds, call)
    thread.daemon = True
    thread.start()


def _numbers(vector: Buffer) -> list[int]:
    return memoryview(vector).cast("B").cast("q").tolist()


class _TwiceTheTimeoutLink(ReferenceLink):
    def read(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        super().read(rank, local, remote, length, 2 * timeout)


class TakesTwiceTheTimeout(FaultyReference):
    """A read ends with the right error, after twice its timeout."""

    link_class = _TwiceTheTimeoutLink


class _LastPieceLateLink(ReferenceLink):
    def write(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        here, there, sizes = _numbers(local), _numbers(remote), _numbers(length)
        last = min(16, sizes[-1])
        super().write(rank, local, remote, array("q", [*sizes[:-1], sizes[-1] - last]), timeout)
        left = sizes[-1] - last
        path = self._paths[rank]

        def land() -> None:
            path.copy(LIBC.process_vm_writev, here[-1] + left, there[-1] + left, last)

        _after(random.uniform(0.001, 0.02), land)


class ReturnsEarly(FaultyReference):
    """A write returns some milliseconds before its last bytes are in place."""

    link_class = _LastPieceLateLink


class _LeakyLink(ReferenceLink):
    def read(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        LIBC.malloc(ctypes.c_size_t(512))
        super().read(rank, local, remote, length, timeout)


class LeaksMemory(FaultyReference):
    """Each read leaks half a KiB of memory that Python does not know."""

    link_class = _LeakyLink


class _DeafLink(ReferenceLink):
    def read(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        deadline = time.monotonic() + timeout
        try:
            super().read(rank, local, remote, length, timeout)
        except PeerLost as error:
            while time.monotonic() < deadline and rank not in self._ended:
                time.sleep(0.01)
            raise TransferError(str(error)) from None


class NoticesDeathByTimeout(FaultyReference):
    """It waits for a dead peer until the deadline; then the error is right."""

    link_class = _DeafLink


class _Settled:
    def settled(self) -> bool:
        return True


class _Never:
    def settled(self) -> bool:
        return False


class _LandsLateLink(ReferenceLink):
    def _land(self, call: Callable[..., int], rank: int, vectors: Sequence[Buffer]) -> None:
        (here, *_), (there, *_), (size, *_) = (_numbers(vector) for vector in vectors)
        if rank not in self._ended:
            self._paths[rank].copy(call, here, there, min(PIECE, size))

    def _late(
        self, move: Callable[..., None], call: Callable[..., int], rank: int, *vectors: Buffer,
        timeout: float,
    ) -> None:  # fmt: skip
        try:
            move(rank, *vectors, timeout)
        except TransferTimeout:
            _after(LATE, lambda: self._land(call, rank, vectors))
            raise


class _ReadsLandLateLink(_LandsLateLink):
    def read(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        self._late(
            super().read, LIBC.process_vm_readv, rank, local, remote, length, timeout=timeout
        )


class ReadsLandLate(FaultyReference):
    """A piece of a read arrives here after the read has timed out."""

    link_class = _ReadsLandLateLink


class _WritesLandLateLink(_LandsLateLink):
    def write(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        self._late(
            super().write, LIBC.process_vm_writev, rank, local, remote, length, timeout=timeout
        )


class WritesLandLate(FaultyReference):
    """A piece of a write arrives at the owner after the write has timed out."""

    link_class = _WritesLandLateLink


class _SettledEarlyLink(_ReadsLandLateLink):
    def read(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        try:
            super().read(rank, local, remote, length, timeout)
        except TransferTimeout as error:
            error.in_flight = _Settled()
            raise


class SettlesEarly(FaultyReference):
    """It says that a read has settled, of which a piece still arrives."""

    link_class = _SettledEarlyLink


class _NeverSettlesLink(ReferenceLink):
    def read(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        try:
            super().read(rank, local, remote, length, timeout)
        except TransferTimeout as error:
            error.in_flight = _Never()
            raise

    def force(self, rank: int) -> None:
        self.abort(rank)


class ForcesNothing(FaultyReference):
    """What is in flight does not settle after `force`."""

    link_class = _NeverSettlesLink


class _ForcesAllLink(ReferenceLink):
    _all: ClassVar[list[ReferenceLink]] = []

    def __init__(self, group: Group, regions: Sequence[Region], access: Access) -> None:
        super().__init__(group, regions, access)
        self._all.append(self)

    def force(self, rank: int) -> None:
        for link in self._all:
            for other in link._paths:
                link.abort(other)


class ForcesAllLinks(FaultyReference):
    """`force` ends the paths of all links."""

    link_class = _ForcesAllLink


class _ForcesInTimeLink(ReferenceLink):
    def force(self, rank: int) -> None:
        if rank not in self._ended:
            time.sleep(6)
        self.abort(rank)


class ForcesForever(FaultyReference):
    """`force` waits for a long time."""

    link_class = _ForcesInTimeLink


class NamesIdleWriters(FaultyReference):
    """`close` returns every rank that could write, although it says that it revokes their access."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, revokes_access=True)


class _PollingLink(ReferenceLink):
    def __init__(self, group: Group, regions: Sequence[Region], access: Access) -> None:
        super().__init__(group, regions, access)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def _poll(self) -> None:
        while not self._closed.is_set():
            time.sleep(0.005)

    def close(self) -> frozenset[int]:
        self._closed.set()
        self._thread.join()
        return super().close()


class Polls(FaultyReference):
    """A thread per link looks for work all the time."""

    link_class = _PollingLink


class _SharedBufferLink(ReferenceLink):
    def __init__(self, group: Group, regions: Sequence[Region], access: Access) -> None:
        super().__init__(group, regions, access)
        self._buffer = ctypes.create_string_buffer(4 << 20)

    def read(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        here, sizes = _numbers(local), _numbers(length)
        staging = ctypes.addressof(self._buffer)
        if len(here) > 1 or sizes[0] > len(self._buffer):
            super().read(rank, local, remote, length, timeout)
            return
        super().read(rank, array("q", [staging]), remote, length, timeout)
        ctypes.memmove(here[0], staging, sizes[0])


class SharesABuffer(FaultyReference):
    """All transfers of a link go through the same buffer."""

    link_class = _SharedBufferLink

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, parallel=4)


class _BackwardsLink(ReferenceLink):
    def read(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        here, there, sizes = (array("q", _numbers(v)[::-1]) for v in (local, remote, length))
        super().read(rank, here, there, sizes, timeout)


class ReadsBackwards(FaultyReference):
    """It declares `ordered_reads`, and reads the last segment first."""

    link_class = _BackwardsLink

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, ordered_reads=True)


class _KnowsOldRegionsLink(ReferenceLink):
    def __init__(
        self, group: Group, regions: Sequence[Region], access: Access, known: Sequence[Region]
    ) -> None:
        super().__init__(group, regions, access)
        self._known = [(region.address, region.address + region.size) for region in known]

    def read(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        super().read(rank, local, remote, length, timeout)
        for address in _numbers(local):
            if not any(begin <= address < end for begin, end in self._known):
                raise TransferError(f"{address:#x} is not in registered memory", link_usable=True)


class ForgetsNewRegions(FaultyReference):
    """A link knows the memory that there was when it was opened, and no other."""

    def __init__(self, options: TransportOptions) -> None:
        super().__init__(options)
        self._live: list[Region] = []

    def allocate(self, size: int, placement: object) -> Region:
        region = super().allocate(size, placement)  # type: ignore[arg-type]
        self._live.append(region)
        return region

    def register(self, address: int, size: int, placement: object) -> Region:
        region = super().register(address, size, placement)  # type: ignore[arg-type]
        self._live.append(region)
        return region

    def release(self, region: Region) -> None:
        self._live.remove(region)
        super().release(region)

    def open(self, group: Group, regions: Sequence[Region], access: Access) -> ReferenceLink:
        return _KnowsOldRegionsLink(group, regions, access, list(self._live))


class _CrashingLink(ReferenceLink):
    def read(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        print("these are my last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)


class Crashes(FaultyReference):
    """A read ends the process."""

    link_class = _CrashingLink


class BlocksOnLoss(FaultyReference):
    """`peer_lost` waits, on the thread that serves all links."""

    def peer_lost(self, peer: Peer) -> None:
        time.sleep(3)


class DisconnectsSlowly(FaultyReference):
    """`disconnect` waits for a peer that has ended."""

    def disconnect(self, peer: Peer) -> None:
        if peer.pidfd is not None and select.select([peer.pidfd], [], [], 0)[0]:
            time.sleep(6)


class _OldBytesLink(ReferenceLink):
    def __init__(self, group: Group, regions: Sequence[Region], access: Access) -> None:
        super().__init__(group, regions, access)
        self._read: dict[tuple[object, ...], list[bytes]] = {}

    def read(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        here, sizes = _numbers(local), _numbers(length)
        key = (rank, *_numbers(remote), *sizes)
        if key not in self._read:
            super().read(rank, local, remote, length, timeout)
            self._read[key] = [ctypes.string_at(*each) for each in zip(here, sizes, strict=True)]
        for address, data in zip(here, self._read[key], strict=True):
            ctypes.memmove(address, data, len(data))


class ReadsWhatWasThere(FaultyReference):
    """Says that it follows addresses, and reads what was there at the first read."""

    link_class = _OldBytesLink


FAULTY_TRANSFERS = (
    FaultyTransport(TakesTwiceTheTimeout, "a_long_transfer_ends_by_its_deadline"),
    FaultyTransport(ReturnsEarly, "all_bytes_are_there_at_the_return[65536-16-write]"),
    FaultyTransport(LeaksMemory, "transfers_leave_no_memory[read]"),
    FaultyTransport(NoticesDeathByTimeout, "a_peer_that_was_killed_is_lost"),
    FaultyTransport(
        NoticesDeathByTimeout, "a_peer_that_dies_in_a_transfer_is_noticed[moving-read]"
    ),
    FaultyTransport(ReadsLandLate, "a_read_that_timed_out_lands_nowhere_later[wait]"),
    FaultyTransport(WritesLandLate, "a_write_that_timed_out_lands_nowhere_later[wait]"),
    FaultyTransport(SettlesEarly, "a_read_that_timed_out_lands_nowhere_later[wait]"),
    FaultyTransport(ForcesNothing, "a_read_that_timed_out_lands_nowhere_later[force]"),
    FaultyTransport(ForcesAllLinks, "force_ends_one_path"),
    FaultyTransport(ForcesForever, "force_ends_one_path"),
    FaultyTransport(NamesIdleWriters, "close_names_no_rank_that_is_idle"),
    FaultyTransport(Polls, "many_idle_links_take_no_processor"),
    FaultyTransport(SharesABuffer, "transfers_at_a_time_over_one_link_are_kept_apart"),
    FaultyTransport(ReadsBackwards, "the_last_segment_is_read_last"),
    FaultyTransport(ReadsWhatWasThere, "memory_that_is_replaced_is_followed"),
    FaultyTransport(ForgetsNewRegions, "memory_added_to_an_open_link_is_local[host]"),
    FaultyTransport(Crashes, "sizes[1-read]"),
    FaultyTransport(BlocksOnLoss, "a_peer_that_core_has_lost_is_given_up[killed]"),
    FaultyTransport(DisconnectsSlowly, "a_peer_that_core_has_lost_is_given_up[killed]"),
)

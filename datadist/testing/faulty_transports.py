"""Faulty transports, each of which violates one rule, to test the kit.

They derive from the reference transport and change a few lines. :data:`FAULTY_TRANSPORTS` lists the
test of the kit that must fail for each; ``tests/testing/test_faulty_transports.py`` checks that it fails.
"""

from __future__ import annotations

import ctypes
import os
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from datadist.testing.reference import ReferenceLink, ReferenceTransport
from datadist.transport import (
    Access,
    Capabilities,
    Group,
    KnownCall,
    KnownWay,
    LinkError,
    Offer,
    PeerLost,
    Region,
    TransferTimeout,
    Transport,
    Unsupported,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["FAULTY_TRANSPORTS", "FaultyReference", "FaultyTransport"]


class FaultyReference(ReferenceTransport):
    """The reference transport with other links."""

    link_class: ClassVar[type[ReferenceLink]] = ReferenceLink

    def open(self, group: Group, regions: Sequence[Region], access: Access) -> ReferenceLink:
        return self.link_class(group, regions, access)


class _ManyDescriptorsLink(ReferenceLink):
    def offer(self, rank: int) -> Offer:
        fds = [os.memfd_create("plenty") for _ in range(Offer.MAX_FDS + 1)]
        return Offer(super().offer(rank).data, fds)


class OffersTooMuch(FaultyReference):
    """An offer has more descriptors than core carries."""

    link_class = _ManyDescriptorsLink


class OpensOneAtATime(FaultyReference):
    """A link cannot be opened while another one is."""

    _busy = False

    def open(self, group: Group, regions: Sequence[Region], access: Access) -> ReferenceLink:
        if self._busy:
            raise LinkError("another link is being opened")
        self._busy = True
        try:
            time.sleep(0.1)
            return super().open(group, regions, access)
        finally:
            self._busy = False


class _NamesNobodyLink(ReferenceLink):
    def close(self) -> frozenset[int]:
        super().close()
        return frozenset()


class WritesAfterClose(FaultyReference):
    """Peers still write after the owner has closed, although `close` returned no rank."""

    link_class = _NamesNobodyLink


class _NoDeadlineLink(ReferenceLink):
    def read(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        super().read(rank, local, remote, length, timeout + 60)


class IgnoresTimeout(FaultyReference):
    """A read goes on for a minute after its deadline."""

    link_class = _NoDeadlineLink


class _HoldsGilLink(ReferenceLink):
    def read(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        ctypes.PyDLL(None).usleep(3_000_000)  # PyDLL keeps the GIL
        time.sleep(0.1)  # short releases of the GIL: counting runs of others misses this
        super().read(rank, local, remote, length, timeout)


class HoldsGil(FaultyReference):
    """A read does not let other threads run."""

    link_class = _HoldsGilLink


class _ReadsTooMuchLink(ReferenceLink):
    def read(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        sizes = array("q", memoryview(length).cast("B").cast("q"))
        sizes[-1] += 1
        super().read(rank, local, remote, sizes, timeout)


class OffByOne(FaultyReference):
    """A read moves one byte too many."""

    link_class = _ReadsTooMuchLink


class _LeaksDescriptorsLink(ReferenceLink):
    def offer(self, rank: int) -> Offer:
        os.memfd_create("lost")
        return super().offer(rank)


class LeaksDescriptors(FaultyReference):
    """Each offer leaks a descriptor."""

    link_class = _LeaksDescriptorsLink


class _IgnoresDeathLink(ReferenceLink):
    def read(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        try:
            super().read(rank, local, remote, length, timeout)
        except PeerLost:
            return


class SwallowsDeath(FaultyReference):
    """A read from a dead peer succeeds."""

    link_class = _IgnoresDeathLink


class _WaitsForPeerLink(ReferenceLink):
    def read(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        end = time.monotonic() + timeout
        while _stopped(self._paths[rank].pid):
            if time.monotonic() > end:
                raise TransferTimeout("the peer did not answer", link_usable=True)
            time.sleep(0.01)
        super().read(rank, local, remote, length, timeout)


class LiesAboutPassiveTargets(FaultyReference):
    """It declares that a stopped peer can be reached, and waits for the peer."""

    link_class = _WaitsForPeerLink


class _ReadOnlyLink(ReferenceLink):
    def write(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        raise Unsupported("writing is not implemented")


class LiesAboutWriting(FaultyReference):
    """It declares that peers can write, and refuses."""

    link_class = _ReadOnlyLink


class GrantsEverything(FaultyReference):
    """Peers with read access can write."""

    def open(self, group: Group, regions: Sequence[Region], access: Access) -> ReferenceLink:
        return ReferenceLink(group, regions, Access.READ_WRITE)


class ClaimsToWatch(FaultyReference):
    """It declares `watches_control`, but its reads do not report what arrived."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, watches_control=True)


class _IgnoresAbortLink(ReferenceLink):
    def abort(self, rank: int) -> None:
        """Do nothing."""


class IgnoresAbort(FaultyReference):
    """An operation in flight does not notice that it was aborted."""

    link_class = _IgnoresAbortLink


class _MovesUncheckedLink(ReferenceLink):
    def read(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        vectors = [memoryview(v).cast("B").cast("q") for v in (local, remote, length)]
        for here, there, size in zip(*vectors, strict=True):
            first, second, third = (array("q", [number]) for number in (here, there, size))
            super().read(rank, first, second, third, timeout)


class MovesBeforeChecking(FaultyReference):
    """Good segments of a call with a bad address are moved."""

    link_class = _MovesUncheckedLink


class _FirstPeerLink(ReferenceLink):
    def read(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        super().read(min(self._paths), local, remote, length, timeout)


class MixesPeers(FaultyReference):
    """It reads from its first peer, whoever was meant."""

    link_class = _FirstPeerLink


class _RaisesOwnErrorsLink(ReferenceLink):
    def read(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        try:
            super().read(rank, local, remote, length, timeout)
        except PeerLost as error:
            raise ConnectionResetError(str(error)) from None


class RaisesItsOwnErrors(FaultyReference):
    """It raises an exception that is not one of the interface."""

    link_class = _RaisesOwnErrorsLink


class _RaisesAtOnceLink(ReferenceLink):
    def attach_at_once(self, rank: int, offer: Offer) -> bool:
        self.attach(rank, offer)
        return True


class RaisesAtOnce(FaultyReference):
    """It attaches at once, and does not leave to a worker what fails."""

    link_class = _RaisesAtOnceLink


class ConvertsTruthValues(FaultyReference):
    """It takes True for 1, as a block of a list."""

    @staticmethod
    def convert_list(
        values: list[int], limit: int, stride: int, base: int, vector: Buffer, distinct: bool, /
    ) -> int:
        view = memoryview(vector).cast("B").cast("q")
        if len(view) != len(values) or (distinct and len(set(values)) < len(values)):
            return -1
        for place, value in enumerate(values):
            if not isinstance(value, int) or not 0 <= value < limit:
                return -1
            view[place] = base + stride * value
        return sum(b == a + 1 for a, b in pairwise(values))


class _BlindWayLink(ReferenceLink):
    def known_way(self, way: KnownWay) -> KnownCall | None:
        def call(theirs: Any, ours: Any, timeout: float) -> float | None:
            local = array("q", [way.local_bases[0] + ours[0] * way.local_stride])
            remote = array("q", [way.remote_bases[0] + theirs[0] * way.remote_stride])
            move = self.write if way.write else self.read
            move(way.rank, local, remote, array("q", [way.block_bytes]), timeout)
            return 0.0

        return call


class IgnoresConditions(FaultyReference):
    """Its call for few blocks does not look at what core names."""

    link_class = _BlindWayLink


def _stopped(pid: int) -> bool:
    """Whether a process of proc(5) has the state "stopped"."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "T"


@dataclass(frozen=True)
class FaultyTransport:
    """A transport that must not pass, and the test that must fail."""

    transport_class: type[Transport]
    caught_by: str
    settings: str | None = None
    """Class of the kit's settings that the transport needs, as "module:class"."""

    @property
    def name(self) -> str:
        """Name of its entry point."""
        return f"faulty-{self.transport_class.__name__}"

    @property
    def target(self) -> str:
        """Its entry point."""
        return f"{self.transport_class.__module__}:{self.transport_class.__name__}"


FAULTY_TRANSPORTS = (
    FaultyTransport(OffersTooMuch, "an_offer_can_be_carried"),
    FaultyTransport(OpensOneAtATime, "links_are_opened_at_once"),
    FaultyTransport(WritesAfterClose, "nothing_is_written_after_the_owner_closed"),
    FaultyTransport(IgnoresTimeout, "a_long_transfer_ends_by_its_deadline"),
    FaultyTransport(HoldsGil, "the_gil_is_released[read]"),
    FaultyTransport(OffByOne, "sizes[1-read]"),
    FaultyTransport(LeaksDescriptors, "links_leave_nothing"),
    FaultyTransport(SwallowsDeath, "a_peer_that_was_killed_is_lost"),
    FaultyTransport(LiesAboutPassiveTargets, "a_stopped_peer_is_reached[read]"),
    FaultyTransport(LiesAboutWriting, "sizes[1-write]"),
    FaultyTransport(GrantsEverything, "peers_with_read_access_cannot_write"),
    FaultyTransport(ClaimsToWatch, "reads_say_what_has_arrived[1]"),
    FaultyTransport(IgnoresAbort, "abort_ends_what_is_in_flight"),
    FaultyTransport(MovesBeforeChecking, "bad_remote_addresses_move_nothing[read--1-2]"),
    FaultyTransport(MixesPeers, "all_pairs_at_once[3]"),
    FaultyTransport(RaisesItsOwnErrors, "a_peer_that_was_killed_is_lost"),
    FaultyTransport(RaisesAtOnce, "offers_that_are_none_are_refused[empty]"),
    FaultyTransport(ConvertsTruthValues, "lists_are_converted_exactly"),
    FaultyTransport(IgnoresConditions, "known_ways_look_at_conditions[read-attribute]"),
    FaultyTransport(IgnoresConditions, "known_ways_hear_the_peer[write]"),
)

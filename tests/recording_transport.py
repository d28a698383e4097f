"""The reference transport, which notes what core tells it: of peers, of losses, of regions.

What it notes is of this process. A test can have calls fail, or wait at a gate.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from datadist.testing.reference import ReferenceLink, ReferenceTransport
from datadist.transport import Access, Group, LinkError, Peer, Region, RegistrationError

if TYPE_CHECKING:
    from collections.abc import Sequence

SECONDS = 60.0
EVENTS: list[tuple[Any, ...]] = []
"""(what, whom or which link, more) in order."""
FAILING: dict[str, Exception] = {}
"""By name of a method: what it raises."""
GATES: dict[str, threading.Event] = {}
"""By name of a method: what it waits for."""
WAITING: list[str] = []
"""Methods that wait, or have waited, at a gate."""
THREADS: dict[str, set[str]] = {}
"""By name of a method: names of the threads that called it."""


def _note(what: str, *more: Any) -> None:
    THREADS.setdefault(what, set()).add(threading.current_thread().name)
    if what in GATES:
        WAITING.append(what)
        assert GATES[what].wait(SECONDS)
    if what in FAILING:
        EVENTS.append((f"{what} fails", *more))
        raise FAILING[what]
    EVENTS.append((what, *more))


class Connection:
    """What belongs to a peer; each one has a number."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer.incarnation
        self.number = sum(event[0] == "connect" for event in EVENTS)
        self.given_back = False


class RecordingLink(ReferenceLink):
    """See :class:`RecordingTransport`."""

    def __init__(self, group: Group, regions: Sequence[Region], access: Access) -> None:
        super().__init__(group, regions, access)
        self.name = group.name.partition(".")[0]
        self.peers = [peer for rank, peer in group.peers.items() if rank != group.rank]
        _note("open", self.name, *(peer.connection.number for peer in self.peers))
        for peer in self.peers:
            assert peer.connection.peer == peer.incarnation
            assert not peer.connection.given_back
        assert group.peers[group.rank].connection is None

    def region_added(self, region: Region) -> None:
        _note("added", self.name, region.address)

    def region_removed(self, region: Region) -> None:
        _note("removed", self.name, region.address)

    def close(self) -> frozenset[int]:
        assert not any(peer.connection.given_back for peer in self.peers)
        EVENTS.append(("close", self.name))
        return super().close()


class RecordingTransport(ReferenceTransport):
    """See the module."""

    def connect(self, peer: Peer) -> Connection:
        assert peer.connection is None
        connection = Connection(peer)
        _note("connect", peer.incarnation)
        return connection

    def disconnect(self, peer: Peer) -> None:
        assert not peer.connection.given_back
        peer.connection.given_back = True
        _note("disconnect", peer.incarnation)

    def peer_lost(self, peer: Peer) -> None:
        assert not peer.connection.given_back
        _note("lost", peer.incarnation)

    def open(self, group: Group, regions: Sequence[Region], access: Access) -> RecordingLink:
        _note("opening", group.name.partition(".")[0])
        return RecordingLink(group, regions, access)

    def release(self, region: Region) -> None:
        EVENTS.append(("release", region.address))
        super().release(region)

    def close(self) -> None:
        EVENTS.append(("end",))


LINK_ERROR = LinkError("no endpoint is to be had")
REGISTRATION_ERROR = RegistrationError("the device takes no more")

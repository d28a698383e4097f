"""What the links with one peer process share: made before the first one, given back after the last one.

See :meth:`Transport.connect`, :meth:`Transport.disconnect` and :meth:`Transport.peer_lost`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from datadist.control.session import Descriptor
from datadist.links.domain import Attempt
from datadist.transport import Group, LinkError, Peer, Transport
from datadist.transports.defects import text_of

log = logging.getLogger("datadist.link")

CLOSE_SECONDS = 2.0
"""So long the end of the engine waits for calls of the transport that connect or disconnect."""
LOOK_SECONDS = 0.1
GIVEN_UP = "the link was given up meanwhile"
CONNECTION_METHODS = "connect", "peer_lost", "disconnect"
"""Methods of a transport that has connections."""


@dataclass(eq=False)
class _Connection:
    """One peer's. The transport is called with ``lock`` held, and so about one peer at a time."""

    peer: Peer
    processes: list[Descriptor]
    """Keeps descriptors open that the peer has."""
    users: int = 0
    """Links, also those that are about to connect."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    connected: bool = False
    lost: bool = False
    """Whether the peer was lost, and newcomers get another connection."""
    told: bool = False
    """Whether the transport knows of the loss."""


class PeerConnections:
    """Connections by incarnation, counted over links. ``post`` runs a call on the control thread."""

    def __init__(self, transport: Transport, post: Callable[[Callable[[], None]], object]) -> None:
        self._transport = transport
        self._has_connections = any(
            getattr(type(transport), name) is not getattr(Transport, name)
            for name in CONNECTION_METHODS
        )
        """Whether the transport has connections at all."""
        self._post = post
        self._lock = threading.Lock()
        """Guards the two that follow, and the numbers of users; nothing else is done while it is held."""
        self._current: dict[str, _Connection] = {}
        self._all: set[_Connection] = set()
        self._closed = False

    def connect(self, attempt: Attempt, group: Group) -> Group:
        """The group, with what belongs to each peer; on a worker.

        :meth:`disconnect` gives back what this has taken, also where it raises LinkError, or what the
        transport raises.
        """
        if not self._has_connections:
            if attempt.closed or self._closed:
                raise LinkError(GIVEN_UP)
            return group
        peers = dict(group.peers)
        for rank, peer in group.peers.items():
            if rank != group.rank and peer.incarnation:
                connection = self._connected(attempt, self._take(attempt, peer))
                if connection is not None:
                    peers[rank] = replace(peer, connection=connection)
        return replace(group, peers=peers)

    def disconnect(self, attempt: Attempt) -> None:
        """Give back what a link has, which is closed and connects no more; not on the control thread."""
        with attempt.forcing:
            connections, attempt.connections = attempt.connections, []
        for connection in connections:
            self._give_back(connection)

    def on_lost(self, incarnation: str) -> None:
        """A session ended. On the control thread, after attempts that are not complete were given up."""
        with self._lock:
            connection = self._current.pop(incarnation, None)
        if connection is not None:
            connection.lost = True
            self._tell_lost(connection)

    def close(self) -> None:
        """Disconnect what is left, since the engine ends; what still connects is left as it is."""
        with self._lock:
            self._closed = True
            left = list(self._all)
        deadline = time.monotonic() + CLOSE_SECONDS
        for connection in left:
            if not connection.lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
                log.error(
                    "the transport has not come back from connecting to rank %d: what it has taken "
                    "for that stays until the process ends", connection.peer.rank,
                )  # fmt: skip
                continue
            try:
                self._disconnect(connection)
            finally:
                connection.lock.release()

    def _take(self, attempt: Attempt, peer: Peer) -> _Connection:
        """Count the attempt as a user of its peer's connection."""
        with attempt.forcing, self._lock:
            if attempt.closed or self._closed:
                raise LinkError(GIVEN_UP, peer.rank)
            connection = self._current.get(peer.incarnation)
            if connection is None:
                connection = _Connection(peer, list(attempt.processes))
                self._current[peer.incarnation] = connection
                self._all.add(connection)
            connection.users += 1
            attempt.connections.append(connection)
        return connection

    def _connected(self, attempt: Attempt, connection: _Connection) -> Any:
        with connection.lock:
            if not connection.connected:
                if attempt.dead or connection.lost or self._closed:
                    raise LinkError("the peer has left meanwhile", connection.peer.rank)
                value = self._transport.connect(connection.peer)
                connection.peer = replace(connection.peer, connection=value)
                connection.connected = True
        if connection.lost:  # meanwhile: who noticed it did not wait for the lock
            self._post(lambda: self._tell_lost(connection))
        return connection.peer.connection

    def _tell_lost(self, connection: _Connection) -> None:
        """Does not wait: who holds the lock disconnects, or connects and has this called again."""
        if not connection.lock.acquire(blocking=False):
            return
        try:
            if connection.connected and not connection.told:
                connection.told = True
                self._call(self._transport.peer_lost, connection.peer)
        finally:
            connection.lock.release()

    def _give_back(self, connection: _Connection) -> None:
        """Count one user less; the last one disconnects. Newcomers wait until that is done.

        Nobody connects who is not a user. So this does not wait for a call that connects: either it
        gave back the last use, or there are users again.
        """
        with self._lock:
            connection.users -= 1
        while connection.users == 0:
            if connection.lock.acquire(timeout=LOOK_SECONDS):
                try:
                    if connection.users == 0:
                        self._disconnect(connection)
                finally:
                    connection.lock.release()
                break
        with self._lock:
            if connection.users == 0:
                self._all.discard(connection)
                if self._current.get(connection.peer.incarnation) is connection:
                    del self._current[connection.peer.incarnation]
        if connection.lost:  # meanwhile: who noticed it did not wait for the lock
            self._post(lambda: self._tell_lost(connection))

    def _disconnect(self, connection: _Connection) -> None:
        if connection.connected:
            connection.connected = False
            self._call(self._transport.disconnect, connection.peer)
            connection.peer = replace(connection.peer, connection=None)

    def _call(self, method: Callable[[Peer], None], peer: Peer) -> None:
        """Of the transport, which must not raise here."""
        try:
            method(peer)
        except Exception as error:
            why = text_of(error, self._transport)
            log.error("%s of the transport raised for rank %d: %s", method.__name__, peer.rank, why)

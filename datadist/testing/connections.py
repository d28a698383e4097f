"""What a process of the kit holds of its peers, as core does: one connection per peer process."""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import dataclass, field, replace

from datadist.transport import Peer, Transport


@dataclass
class Connection:
    """A peer process while links with it are open."""

    peer: Peer
    core: socket.socket
    """What stands for core's connection to the peer."""
    remote: socket.socket
    """The other end of that."""
    links: set[str] = field(default_factory=set)
    lost: bool = False

    def close(self) -> None:
        """Give the descriptors back."""
        for end in (self.core, self.remote):
            end.close()
        if self.peer.pidfd is not None:
            os.close(self.peer.pidfd)


class Connections:
    """The peers of all links of a process, by incarnation; each is connected once, and counted."""

    def __init__(self) -> None:
        self._all: dict[str, Connection] = {}
        self._lock = threading.Lock()

    def take(
        self, transport: Transport, link: str, rank: int, incarnation: str, pid: int,
        address: str | None,
    ) -> Peer:  # fmt: skip
        """The peer for a group of ``link``; connects to it if this is its first link.

        With an ``address`` it is met over the network: its process is not known then.
        """
        with self._lock:
            connection = self._all.get(incarnation)
            if connection is None:
                connection = _connected(transport, rank, incarnation, pid, address)
                self._all[incarnation] = connection
            connection.links.add(link)
        return replace(connection.peer, rank=rank)

    def give_back(self, transport: Transport, link: str) -> float:
        """A link is closed; disconnect from peers without another one. Seconds the slowest took."""
        slowest = 0.0
        with self._lock:
            left = [c for c in self._all.values() if c.links == {link}]
            for connection in self._all.values():
                connection.links.discard(link)
            self._all = {name: c for name, c in self._all.items() if c.links}
        for connection in left:
            begin = time.monotonic()
            transport.disconnect(connection.peer)
            slowest = max(slowest, time.monotonic() - begin)
            connection.close()
        return slowest

    def of(self, link: str, rank: int) -> Connection:
        """The connection to a rank of a link."""
        return next(
            c for c in self._all.values() if link in c.links and c.peer.rank == rank
        )  # the kit gives a process the same rank in all links


def _connected(
    transport: Transport, rank: int, incarnation: str, pid: int, address: str | None
) -> Connection:
    core, remote = socket.socketpair()
    if address is None:
        peer = Peer(rank, incarnation, pid, os.pidfd_open(pid), control_fd=core.fileno())
    else:
        peer = Peer(rank, incarnation, address=address, control_fd=core.fileno())
    connection = Connection(peer, core, remote)
    try:
        connection.peer = replace(connection.peer, connection=transport.connect(connection.peer))
    except BaseException:
        connection.close()
        raise
    return connection

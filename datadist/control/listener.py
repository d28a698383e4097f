"""Listens for sessions over TCP; limits the cost of unauthenticated connections."""

from __future__ import annotations

import errno
import resource
import socket
import time
from collections.abc import Callable

from datadist.base.addresses import canonical
from datadist.control.hostport import HostPort
from datadist.control.places import Places
from datadist.control.reactor import READ, Reactor
from datadist.control.refusals import Refusals
from datadist.control.tcp import NetworkSettings, Proving, TcpSession

MAX_HANDSHAKES = min(1024, max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8))
"""Connections of one listener that have not proved themselves yet; of more one has to go. Those of hosts
that members are expected from are counted apart from all others. Who is shown out comes again, so that
a large house is quieter than a small one; an eighth of this process's descriptors is what it may take."""
GREETING_SECONDS, PROOF_SECONDS = 0.03, 0.1
"""What everybody has for the greeting, and for both that and the proof, in however large a crowd."""
ACCEPTS_PER_TURN = 32
"""Connections that are accepted before it is anybody else's turn."""
BACKLOG = 4096
"""Connections that may wait in the kernel's queue; it takes less where net.core.somaxconn says so."""
_PAUSE_SECONDS = 0.05


class NetworkError(Exception):
    """An address cannot be listened on; the text says why and what to do."""


class Listener:
    """A listening socket; authenticated engines are reported with ``on_session``.

    The endpoint's host must be an address (see :func:`look_up`); port 0 takes any free one. Raises
    :class:`NetworkError`. ``expected(host)`` says whether a member is expected from an address: strangers
    of other addresses never cost it its place. ``refusals`` remembers, by host, why the last connection
    was refused.
    """

    def __init__(
        self,
        reactor: Reactor,
        endpoint: HostPort,
        settings: NetworkSettings,
        on_session: Callable[[TcpSession], None],
        expected: Callable[[str], bool] = lambda _host: False,
    ) -> None:
        self._reactor = reactor
        self._settings = settings
        self._on_session = on_session
        self._expected = expected
        self._sock = _listening_socket(endpoint)
        self.endpoint = HostPort(endpoint.host, self._sock.getsockname()[1])
        """Where it listens: the port is the real one where 0 was asked for."""
        self.refusals = Refusals(self.endpoint, expected)
        self._strangers, self._members = (
            Places[Proving](MAX_HANDSHAKES, MAX_HANDSHAKES, lambda each: _seconds_sure(each) > 0)
            for _ in range(2)
        )
        self._resume()

    def close(self) -> None:
        """Stop listening; sessions live on."""
        self._reactor.unwatch(self._sock.fileno())
        self._sock.close()
        for places in (self._strangers, self._members):
            for proving in places:
                places.discard(proving)
                proving.cancel()

    def abandon(self) -> None:
        """In a forked child: close the descriptors."""
        self._sock.close()
        for proving in (*self._strangers, *self._members):
            proving.abandon()

    def _resume(self) -> None:
        if self._sock.fileno() >= 0:
            self._reactor.watch(self._sock.fileno(), READ, self._on_accept)

    def _pause(self, seconds: float) -> None:
        self._reactor.unwatch(self._sock.fileno())
        self._reactor.later(seconds, self._resume)

    def _seconds_to_room(self) -> float:
        """How long nobody can be shown out yet: who comes waits in the kernel's queue for so long."""
        eldest = self._strangers.next()
        return 0.0 if eldest is None else _seconds_sure(eldest)

    def _on_accept(self, _events: int) -> None:
        """Accept some; the rest waits until everybody else has had a turn, and until there is room."""
        for _ in range(ACCEPTS_PER_TURN):
            wait = self._seconds_to_room()
            if wait > 0:
                self._pause(wait)
                return
            try:
                sock, address = self._sock.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:  # it has gone already
                continue
            except OSError as error:
                self.refusals.note("any host", f"cannot accept: {error.strerror}")
                self._pause(_PAUSE_SECONDS)
                return
            self._prove(sock, canonical(str(address[0])))

    def _make_room(self, places: Places[Proving], host: str) -> None:
        eldest = places.crowded(host)
        if eldest is not None:
            crowd = f"{MAX_HANDSHAKES} connections that have proved nothing"
            self.refusals.note(places.host(eldest), f"it was the eldest of {crowd}")
            places.discard(eldest)
            eldest.cancel()

    def _prove(self, sock: socket.socket, host: str) -> None:
        places = self._members if self._expected(host) else self._strangers

        def proved(session: TcpSession) -> None:
            places.discard(proving)
            self.refusals.forget(host)
            self._on_session(session)

        def failed(reason: str) -> None:
            places.discard(proving)
            self.refusals.note(host, reason)

        self._make_room(places, host)
        sock.setblocking(False)
        proving = Proving(self._reactor, sock, self._settings, False, proved, failed)
        proving.on_greeted = lambda: places.show(proving)
        places.add(proving, host)


def _seconds_sure(proving: Proving) -> float:
    """For how long a connection is not shown out for another one."""
    sure = PROOF_SECONDS if proving.has_greeted else GREETING_SECONDS
    return proving.began + sure - time.monotonic()


def _listening_socket(endpoint: HostPort) -> socket.socket:
    try:
        family, address = endpoint.resolve()[0]
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    except OSError as error:
        raise NetworkError(f"cannot listen at {endpoint}: {error.strerror}") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise NetworkError(listen_problem(endpoint, error)) from error
    return sock


def listen_problem(endpoint: HostPort, error: OSError) -> str:
    """Why an address cannot be listened on, and what to do."""
    hints = {
        errno.EADDRINUSE: "another process uses this port: choose another one, or end it (engines "
        "cannot share a port)",
        errno.EADDRNOTAVAIL: "this host has no such address: use one that `ip addr` shows",
        errno.EACCES: "this user may not use it: choose a port above 1023",
    }
    return f"cannot listen at {endpoint}: {hints.get(error.errno or 0, error.strerror)}"

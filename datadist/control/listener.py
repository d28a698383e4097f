"""Listens for sessions over TCP; limits the cost of unauthenticated connections."""

from __future__ import annotations

import errno
import resource
import socket
import time
from collections.abc import Callable

from datadist.base.addresses import canonical
from datadist.base.picklable import PicklableError
from datadist.control.hostport import HostPort
from datadist.control.places import Places
from datadist.control.reactor import READ, Reactor
from datadist.control.refusals import Refusals
from datadist.control.tcp import Authentication, NetworkSettings, TcpSession

MAX_HANDSHAKES = min(1024, max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8))
"""Connections of one listener that have not proved themselves yet; of more one has to go. Those of hosts
that members are expected from are counted apart from all others. Who is disconnected comes again, so that
a large house is quieter than a small one; an eighth of this process's descriptors is what it may take."""
GREETING_SECONDS, PROOF_SECONDS = 0.03, 0.1
"""What everybody has for the greeting, and for both that and the proof, in however large a crowd."""
ACCEPTS_PER_TURN = 32
"""Connections that are accepted before it is anybody else's turn."""
BACKLOG = 4096
"""Connections that may wait in the kernel's queue; it takes less where net.core.somaxconn says so."""
_PAUSE_SECONDS = 0.05


class NetworkError(PicklableError):
    """An address cannot be listened on; the text says why and what to do.

    ``in_use`` is the address where another socket has the port.
    """

    def __init__(self, text: str, in_use: HostPort | None = None) -> None:
        super().__init__(text)
        self.in_use = in_use


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
            Places[Authentication](
                MAX_HANDSHAKES, MAX_HANDSHAKES, lambda each: _seconds_sure(each) > 0
            )
            for _ in range(2)
        )
        self._resume()

    def close(self) -> None:
        """Stop listening; sessions live on."""
        self._reactor.unwatch(self._sock.fileno())
        self._sock.close()
        for places in (self._strangers, self._members):
            for authentication in places:
                places.discard(authentication)
                authentication.cancel()

    def abandon(self) -> None:
        """In a forked child: close the descriptors."""
        self._sock.close()
        for authentication in (*self._strangers, *self._members):
            authentication.abandon()

    def _resume(self) -> None:
        if self._sock.fileno() >= 0:
            self._reactor.watch(self._sock.fileno(), READ, self._on_accept)

    def _pause(self, seconds: float) -> None:
        self._reactor.unwatch(self._sock.fileno())
        self._reactor.later(seconds, self._resume)

    def _seconds_to_room(self) -> float:
        """How long nobody can be disconnected yet: who comes waits in the kernel's queue for so long."""
        oldest = self._strangers.next()
        return 0.0 if oldest is None else _seconds_sure(oldest)

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
            self._authenticate(sock, canonical(str(address[0])))

    def _evict_oldest(self, places: Places[Authentication], host: str) -> None:
        """Disconnect who has to go before one more of ``host`` comes, if no place is left.

        What it has sent is read first: it may lie there because this thread was busy.
        """
        heard: Authentication | None = None
        oldest = places.crowded(host)
        while oldest is not None and oldest is not heard:
            oldest.hear()
            oldest, heard = places.crowded(host), oldest
        if oldest is not None:
            crowd = f"{MAX_HANDSHAKES} connections that have proved nothing"
            self.refusals.note(places.host(oldest), f"it was the oldest of {crowd}")
            places.discard(oldest)
            oldest.cancel()

    def _authenticate(self, sock: socket.socket, host: str) -> None:
        places = self._members if self._expected(host) else self._strangers

        def proved(session: TcpSession) -> None:
            places.discard(authentication)
            self.refusals.forget(host)
            self._on_session(session)

        def failed(reason: str) -> None:
            places.discard(authentication)
            self.refusals.note(host, reason)

        self._evict_oldest(places, host)
        sock.setblocking(False)
        authentication = Authentication(self._reactor, sock, self._settings, False, proved, failed)
        authentication.on_greeted = lambda: places.show(authentication)
        places.add(authentication, host)


def _seconds_sure(authentication: Authentication) -> float:
    """For how long a connection is not disconnected for another one."""
    sure = PROOF_SECONDS if authentication.has_greeted else GREETING_SECONDS
    return authentication.began + sure - time.monotonic()


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
        raise listen_problem(endpoint, error) from error
    return sock


def listen_problem(endpoint: HostPort, error: OSError) -> NetworkError:
    """Why an address cannot be listened on, and what to do."""
    hints = {
        errno.EADDRINUSE: "another process uses this port: choose another one, or end it (engines "
        "cannot share a port)",
        errno.EADDRNOTAVAIL: "this host has no such address: use one that `ip addr` shows",
        errno.EACCES: "this user may not use it: choose a port above 1023",
    }
    in_use = endpoint if error.errno == errno.EADDRINUSE else None
    text = hints.get(error.errno or 0, error.strerror)
    return NetworkError(f"cannot listen at {endpoint}: {text}", in_use)

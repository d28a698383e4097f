"""Sessions over TCP: dialling, and the handshake in front of every one of them.

A connection becomes a :class:`TcpSession` only after both ends have authenticated with the key (see
:mod:`datadist.control.channel`). Everything here runs on the reactor's thread.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import logging
import os
import socket
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datadist.base.addresses import canonical, is_address
from datadist.base.texts import in_seconds
from datadist.control.channel import TAG_SIZE, Handshake, HandshakeError, Seals
from datadist.control.hostport import HostPort
from datadist.control.reactor import READ, WRITE, Reactor
from datadist.control.session import CHUNK, Session

Address = tuple[socket.AddressFamily, Any]

log = logging.getLogger("datadist.control")

HANDSHAKE_SECONDS = 5.0
"""For connecting, and again for the handshake. Who is accepted has this once, hello included."""
REFUSED = "connection refused (nothing listens there yet, or the port is another one)"


@dataclass(frozen=True)
class NetworkSettings:
    """What sessions over TCP need to know."""

    key: bytes = field(repr=False)
    """The secret that all engines share."""
    peer_timeout: float = 10.0
    """Seconds of silence of the peer's host after which it counts as dead."""


class TcpSession(Session):
    """A session over a connection whose handshake is done; passes no descriptors."""

    _tag_size = TAG_SIZE
    inline = False  # a seal that is interrupted would count twice
    since: float
    """When the connection began, by the monotonic clock."""

    def __init__(
        self, reactor: Reactor, sock: socket.socket, seals: Seals, settings: NetworkSettings
    ) -> None:
        self._seals = seals
        self._settings = settings
        self.since = time.monotonic()
        super().__init__(reactor, sock)

    def _identify(self) -> None:
        address, port = self._sock.getpeername()[:2]
        self.address = canonical(address)
        self.local_address: str = self._sock.getsockname()[0]
        self._peer = str(HostPort(address, port))
        _keep_alive(self._sock, self._settings.peer_timeout)

    @property
    def peer(self) -> str:
        """Address and port of the other end."""
        return self._peer

    @property
    def takes_descriptors(self) -> bool:
        """Never: they cannot leave the host."""
        return False

    def _seal(self, frame: bytes) -> bytes:
        return frame + self._seals.sending.next(frame)

    def _unseal(self, inbox: bytearray, start: int, end: int) -> bool:
        genuine = self._seals.receiving.check(
            inbox[start:end], bytes(inbox[end : end + self._tag_size])
        )
        if not genuine:
            log.warning("%s: a frame with a wrong MAC; the connection is closed", self.peer)
        return genuine

    def _receive_some(self) -> tuple[bytes, list[int], int]:
        return self._sock.recv(CHUNK), [], 0

    def _underway(self) -> int:
        count = array.array("i", [0])
        with contextlib.suppress(OSError, ValueError):  # closed meanwhile
            fcntl.ioctl(self._sock, termios.TIOCOUTQ, count)
        return count[0]

    def _explain(self, doing: str, error: OSError) -> str:
        if error.errno in (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH):
            return (
                f"no sign of life from {self.peer} for {in_seconds(self._settings.peer_timeout)} (its "
                f"host is down, or the network is cut): {error.strerror}"
            )
        return super()._explain(doing, error)


def _keep_alive(sock: socket.socket, timeout: float) -> None:
    """Have the kernel end the connection when the peer's host is silent for ``timeout`` seconds."""
    probe = max(1, int(timeout / 4))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, probe)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout * 1000))


class Authentication:
    """A connected socket until its handshake is done or has failed."""

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        settings: NetworkSettings,
        dialled: bool,
        on_session: Callable[[TcpSession], None],
        on_failed: Callable[[str], None],
        seconds: float = HANDSHAKE_SECONDS,
    ) -> None:
        self._reactor = reactor
        self._sock = sock
        self._settings = settings
        self._handshake = Handshake(settings.key, dialled)
        self._on_session = on_session
        self._on_failed = on_failed
        self._timer = reactor.later(
            seconds,
            lambda: self._fail(
                f"it did not finish the handshake in {in_seconds(seconds)} (is it stopped, or no "
                "datadist engine?)"
            ),
        )
        self.began = time.monotonic()
        self.hung_up = False
        """Whether the other end closed the connection in the handshake."""
        self.on_greeted: Callable[[], None] = lambda: None
        """Hears when all of the other end's greeting has come; its proof is next."""
        self._open = True
        reactor.watch(sock.fileno(), READ, self._on_readable)
        self._say(self._handshake.begin())

    @property
    def has_greeted(self) -> bool:
        """Whether all of the other end's greeting has come; what follows is its proof."""
        return self._handshake.greeted

    def hear(self) -> None:
        """Handle what has arrived by now."""
        self._on_readable(READ)

    def cancel(self) -> None:
        """Close without reporting a failure."""
        if self._open:
            self._detach()
            self._sock.close()

    def abandon(self) -> None:
        """In a forked child: close the descriptor."""
        self._sock.close()

    def _detach(self) -> None:
        self._open = False
        self._timer.cancel()
        self._reactor.unwatch(self._sock.fileno())

    def _fail(self, reason: str) -> None:
        self.cancel()
        self._on_failed(reason)

    def _say(self, data: bytes) -> None:
        """Send a few bytes, which always fit into the buffer of a new connection."""
        try:
            if data and self._sock.send(data, socket.MSG_NOSIGNAL) < len(data):
                self._fail("it does not read")
        except OSError as error:
            self._fail(f"sending failed: {error.strerror}")

    def _on_readable(self, _events: int) -> None:
        while self._open and self._handshake.wanted:
            try:
                data = self._sock.recv(self._handshake.wanted)
                before = self._handshake.greeted
                answer = self._handshake.feed(data) if data else b""
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ECONNRESET:
                    self._on_closed()
                else:
                    self._fail(str(error.strerror))
                return
            except HandshakeError as error:
                self._fail(str(error))
                return
            if not data:
                self._on_closed()
                return
            if self._handshake.greeted and not before:
                self.on_greeted()
            self._say(answer)
        if self._open:
            self._finish()

    def _on_closed(self) -> None:
        self.hung_up = True
        self._fail(self._handshake.closed())

    def _finish(self) -> None:
        seals = self._handshake.seals
        assert seals is not None
        self._detach()
        try:
            session = TcpSession(self._reactor, self._sock, seals, self._settings)
        except OSError as error:  # the peer has gone already
            self._sock.close()
            self._on_failed(str(error.strerror))
            return
        session.since = self.began
        self._on_session(session)


def look_up(
    reactor: Reactor,
    endpoint: HostPort,
    found: Callable[[list[Address]], None],
    failed: Callable[[str], None],
) -> None:
    """Find the socket addresses of an endpoint; one of the calls comes later, on the reactor."""

    def run() -> None:
        try:
            addresses = endpoint.resolve()
        except OSError as error:
            reason = f"the name {endpoint.host!r} cannot be looked up: {error.strerror or error}"
            reactor.post(lambda: failed(reason))
        else:
            reactor.post(lambda: found(addresses))

    if is_address(endpoint.host):
        run()
    else:  # a name server may take too long
        reactor.helpers.submit(run, owner=endpoint.host)


class Dial:
    """One try to connect: ends in ``on_session(session)`` or ``on_failed(reason)``, once.

    ``seconds`` are for connecting, and again for the handshake.
    """

    def __init__(
        self,
        reactor: Reactor,
        endpoint: HostPort,
        settings: NetworkSettings,
        on_session: Callable[[TcpSession], None],
        on_failed: Callable[[str], None],
        seconds: float = HANDSHAKE_SECONDS,
    ) -> None:
        self._seconds = seconds
        self._reactor = reactor
        self._endpoint = endpoint
        self._settings = settings
        self._on_session = on_session
        self._on_failed = on_failed
        self._addresses: list[Address] = []
        self._sock: socket.socket | None = None
        self._unauthenticated: Authentication | None = None
        self._cancelled = False
        self._timer = reactor.later(seconds, self._too_late)
        look_up(reactor, endpoint, self._try, self._fail)

    @property
    def hung_up(self) -> bool:
        """Whether the other end took the connection, and closed it in the handshake."""
        return self._unauthenticated is not None and self._unauthenticated.hung_up

    def cancel(self) -> None:
        """Stop without reporting a failure."""
        self._cancelled = True
        self._timer.cancel()
        self._drop()
        if self._unauthenticated is not None:
            self._unauthenticated.cancel()

    def abandon(self) -> None:
        """In a forked child: close the descriptor."""
        if self._sock is not None:
            self._sock.close()
        if self._unauthenticated is not None:
            self._unauthenticated.abandon()

    def _try(self, addresses: list[Address]) -> None:
        self._addresses = addresses
        self._next("it has no address")

    def _next(self, reason: str) -> None:
        """Connect to the next address, or fail with what was wrong with the last one."""
        self._drop()
        if self._cancelled:
            return
        if not self._addresses:
            self._fail(reason)
            return
        family, address = self._addresses.pop(0)
        sock = self._sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.setblocking(False)
        error = sock.connect_ex(address)
        if error in (0, errno.EINPROGRESS):
            self._reactor.watch(sock.fileno(), WRITE, self._on_connected)
        else:
            self._next(_connect_problem(error))

    def _on_connected(self, _events: int) -> None:
        sock = self._sock
        assert sock is not None
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            self._next(_connect_problem(error))
            return
        self._reactor.unwatch(sock.fileno())
        self._timer.cancel()
        self._sock = None
        self._unauthenticated = Authentication(
            self._reactor, sock, self._settings, True, self._on_session, self._fail, self._seconds
        )

    def _too_late(self) -> None:
        self._fail(
            f"connecting timed out after {in_seconds(self._seconds)} (the host is down, the address is "
            "wrong, or a firewall drops the packets)"
        )

    def _fail(self, reason: str) -> None:
        if not self._cancelled:
            self.cancel()
            self._on_failed(reason)

    def _drop(self) -> None:
        if self._sock is not None:
            self._reactor.unwatch(self._sock.fileno())
            self._sock.close()
            self._sock = None


def _connect_problem(error: int) -> str:
    if error == errno.ECONNREFUSED:
        return REFUSED
    if error in (errno.EHOSTUNREACH, errno.ENETUNREACH):
        return f"{os.strerror(error).lower()} (the address is wrong, or the network is down)"
    return os.strerror(error)

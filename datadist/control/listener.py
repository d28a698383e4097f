"""Listening for sessions over TCP, within bounds on what strangers can make us do."""

from __future__ import annotations

import errno
import logging
import socket
import time
from collections import Counter
from collections.abc import Callable

from datadist.control.hostport import HostPort
from datadist.control.reactor import READ, Reactor
from datadist.control.tcp import NetworkSettings, Proving, TcpSession

log = logging.getLogger("datadist.control")

MAX_HANDSHAKES = 64
"""Connections of one listener that have not proved themselves yet; of more the eldest has to go."""
MAX_HANDSHAKES_PER_HOST = 16
"""The same for one host, so that a crowd there is at the expense of that host first."""
ACCEPTS_PER_SECOND = 100
"""More than these wait in the kernel's queue."""
REPORT_SECONDS = 10.0
"""Pause between two log lines about the same host."""
_PAUSE_SECONDS = 0.05


class NetworkError(Exception):
    """An address cannot be listened on; the text says why and what to do."""


class Listener:
    """A listening socket; engines that prove the key arrive by ``on_session``.

    The endpoint's host must be an address (see :func:`look_up`); port 0 takes any free one. Raises
    :class:`NetworkError`. ``refusals`` remembers, by host, why the last one was refused.
    """

    def __init__(
        self,
        reactor: Reactor,
        endpoint: HostPort,
        settings: NetworkSettings,
        on_session: Callable[[TcpSession], None],
    ) -> None:
        self._reactor = reactor
        self._settings = settings
        self._on_session = on_session
        self._sock = _listening_socket(endpoint)
        self.endpoint = HostPort(endpoint.host, self._sock.getsockname()[1])
        """Where it listens: the port is the real one where 0 was asked for."""
        self.refusals: dict[str, str] = {}
        self._reported: dict[str, float] = {}
        self._proving: dict[Proving, str] = {}
        """Hosts, the eldest connection first."""
        self._allowance = float(ACCEPTS_PER_SECOND)
        self._counted_at = time.monotonic()
        self._resume()

    def close(self) -> None:
        """Stop listening; sessions live on."""
        self._reactor.unwatch(self._sock.fileno())
        self._sock.close()
        for proving in list(self._proving):
            proving.cancel()
        self._proving.clear()

    def abandon(self) -> None:
        """In a forked child: close the descriptors."""
        self._sock.close()
        for proving in self._proving:
            proving.abandon()

    def _resume(self) -> None:
        if self._sock.fileno() >= 0:
            self._reactor.watch(self._sock.fileno(), READ, self._on_accept)

    def _pause(self) -> None:
        self._reactor.unwatch(self._sock.fileno())
        self._reactor.later(_PAUSE_SECONDS, self._resume)

    def _may_accept(self) -> bool:
        now = time.monotonic()
        earned = (now - self._counted_at) * ACCEPTS_PER_SECOND
        self._allowance = min(self._allowance + earned, float(ACCEPTS_PER_SECOND))
        self._counted_at = now
        return self._allowance >= 1

    def _on_accept(self, _events: int) -> None:
        while True:
            if not self._may_accept():
                self._pause()
                return
            try:
                sock, address = self._sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                log.warning("cannot accept a connection at %s: %s", self.endpoint, error)
                self._pause()
                return
            self._allowance -= 1
            self._prove(sock, str(address[0]))

    def _make_room(self, host: str) -> None:
        """Of a crowd that proves nothing the eldest has to go: an engine proves itself at once."""
        counts = Counter(self._proving.values())
        if counts[host] >= MAX_HANDSHAKES_PER_HOST:
            crowded, most = host, MAX_HANDSHAKES_PER_HOST
        elif len(self._proving) >= MAX_HANDSHAKES:
            crowded, most = counts.most_common(1)[0][0], MAX_HANDSHAKES
        else:
            return
        eldest = next(proving for proving, its in self._proving.items() if its == crowded)
        del self._proving[eldest]
        eldest.cancel()
        self._refuse(crowded, f"it was the eldest of {most} connections that have proved nothing")

    def _prove(self, sock: socket.socket, host: str) -> None:
        def proved(session: TcpSession) -> None:
            del self._proving[proving]
            self.refusals.pop(host, None)
            self._on_session(session)

        def failed(reason: str) -> None:
            self._proving.pop(proving, None)
            self._refuse(host, reason)

        self._make_room(host)
        sock.setblocking(False)
        proving = Proving(self._reactor, sock, self._settings, False, proved, failed)
        self._proving[proving] = host

    def _refuse(self, host: str, reason: str) -> None:
        if len(self.refusals) > MAX_HANDSHAKES:
            self.refusals.clear()
        self.refusals[host] = reason
        now = time.monotonic()
        if now - self._reported.get(host, -REPORT_SECONDS) < REPORT_SECONDS:
            return
        if len(self._reported) > MAX_HANDSHAKES:
            self._reported.clear()
        self._reported[host] = now
        log.warning("refused a connection of %s at %s: %s", host, self.endpoint, reason)


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
        sock.listen(128)
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

"""The thread of a transport: it serves askers, and what callers have left under way.

It sleeps in the kernel while nothing moves. It polls while NIXL has something to do, and for a moment
after the last request, since the next one often follows.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from typing import Protocol

from datadist.base import threads
from datadist_nixl.greetings import Greetings
from datadist_nixl.library import Agent
from datadist_nixl.options import Options
from datadist_nixl.pauses import pause_after
from datadist_nixl.serving import GREETING, Server
from datadist_nixl.side import Side
from datadist_nixl.stream import Ended, Stream
from datadist_nixl.wire import WireError

log = logging.getLogger("datadist.nixl")

SPIN_SECONDS = 0.0005
"""So long the thread polls without a pause after the last event."""
EPOLL_SECONDS = 0.001
"""Shorter waits are longer by epoll."""
BACKLOG = 512
MAX_STRANGERS = 64
STRANGER_SECONDS = 5.0
"""Most connections that have not shown the greeting, and how long each may take for that."""
MAX_OF_PEER = 8
"""Most connections of one peer process; it needs one, and another one while that ends."""
STOP_SECONDS = 5.0
FINISH_SECONDS = 0.25
"""So long writes from memory that is withdrawn may take to end by themselves, of all peers together."""
TCP_OPTIONS = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000),
)
"""Within a minute a host that is gone ends its connections: at the owner nobody else would notice."""


class Leftover(Protocol):
    """What a caller has left, and must be looked after until it has ended."""

    def tend(self) -> bool:
        """Let it go on; whether it is still under way."""

    def abandon(self) -> None:
        """Give it up: nobody looks after it any more."""


class Service:
    """Listener, thread, and the sides that can be asked."""

    def __init__(self, options: Options, make_agent: Callable[[], Agent]) -> None:
        self._make_agent = make_agent
        self.greetings = Greetings()
        self.sides: dict[bytes, Side] = {}
        """By the secret of its offer."""
        self._servers: dict[int, Server] = {}
        self._busy: dict[Server, None] = {}
        """Those that have to be looked at without an event."""
        self._leftovers: dict[Leftover, float] = {}
        """And when they were left."""
        self._calls: deque[Callable[[], None]] = deque()
        self._aborted: deque[Side] = deque()
        self._stopping = False
        self._open = True
        with contextlib.ExitStack() as stack:
            self._listener, self.address = _listen(options.listen)
            stack.callback(self._listener.close)
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            stack.callback(os.close, self._wake)
            self._epoll = stack.enter_context(select.epoll())
            self._epoll.register(self._listener.fileno(), select.EPOLLIN)
            self._epoll.register(self._wake, select.EPOLLIN)
            self._thread = threading.Thread(target=self._run, name="datadist-nixl", daemon=True)
            self._stack = stack.pop_all()

    def start(self) -> None:
        """Start the thread; :meth:`stop` is due also where this raises."""
        threads.start(self._thread)

    # -- from any thread -------------------------------------------------------------------------

    def call(self, function: Callable[[], None]) -> None:
        """Run a function on the thread, soon."""
        self._calls.append(function)
        if self._open:  # else the number may be that of another descriptor by now
            os.eventfd_write(self._wake, 1)

    def ask(self, function: Callable[[], None], seconds: float) -> bool:
        """As :meth:`call`, and wait for it; whether it was done in that time."""
        if not self._thread.is_alive():
            function()
            return True
        done = threading.Event()

        def run() -> None:
            function()
            done.set()

        self.call(run)
        return done.wait(seconds)

    def tend(self, leftover: Leftover) -> None:
        """Look after something until it has ended."""
        self.call(lambda: self._leftovers.update({leftover: time.monotonic()}))

    def end_soon(self, side: Side) -> None:
        """As :meth:`end_sides`, on the thread; one pass for all that have come until then."""
        self._aborted.append(side)
        self.call(self._end_aborted)

    def _end_aborted(self) -> None:
        sides = []
        while self._aborted:
            sides.append(self._aborted.popleft())
        if sides:
            self.end_sides(sides)

    def end_sides(self, sides: Collection[Side]) -> None:
        """On the thread: nothing that a peer wanted of these sides touches memory afterwards."""
        ended, until = frozenset(sides), time.monotonic() + FINISH_SECONDS
        left = [server for server in self._servers.values() if server.moves(ended)]
        while left and time.monotonic() < until:
            for server in left:
                self._guarded(server, server.advance)
            left = [server for server in left if server.moves(ended)]
            if left:
                time.sleep(0.0002)
        for server in list(self._servers.values()):
            self._guarded(server, functools.partial(server.end_sides, ended))
        for side in ended:
            side.writers.clear()

    def for_servers(self, function: Callable[[Server], None]) -> None:
        """On the thread: for each connection."""
        for server in list(self._servers.values()):
            function(server)

    def stop(self) -> None:
        """End the thread, all connections, and give everything back."""
        if not self._open:
            return
        self._stopping = True
        self.call(lambda: None)
        with contextlib.suppress(RuntimeError):  # it was not started
            self._thread.join(STOP_SECONDS)
        if self._thread.is_alive():
            log.warning("the thread of nixl did not end within %.0f s; it stays", STOP_SECONDS)
            return
        self._end_all()  # what was called or left while the thread was ending
        self._open = False
        self._stack.close()

    # -- on the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        if not self._open:
            return
        last = time.monotonic()
        try:
            while not self._stopping:
                if self._turn(self._timeout(last)):
                    last = time.monotonic()
        except Exception:
            log.exception("unexpected error of the nixl transport; please report it")
        finally:
            self._end_all()

    def _end_all(self) -> None:
        self._work()
        for server in list(self._servers.values()):
            self._drop(server, "the transport is closed")
        while self._leftovers:
            leftover, _ = self._leftovers.popitem()
            leftover.abandon()

    def _timeout(self, last: float) -> float:
        """Seconds to wait for events; sleeps itself where epoll would sleep too long."""
        now = time.monotonic()
        if not (self._leftovers or self._busy):
            return 0 if now - last < SPIN_SECONDS else -1
        moved = max((*(server.last for server in self._busy), *self._leftovers.values()))
        seconds = pause_after(now - moved, first=all(server.brief for server in self._busy))
        if seconds >= EPOLL_SECONDS and now - last >= SPIN_SECONDS:
            return seconds
        if 0 < seconds < EPOLL_SECONDS:
            time.sleep(seconds)
        return 0

    def _turn(self, timeout: float) -> bool:
        """Serve everybody once; whether there was something to do."""
        moved = False
        for fd, _ in self._epoll.poll(timeout):
            moved = True
            if fd in self._servers:
                self._guarded(self._servers[fd], self._servers[fd].serve)
            elif fd == self._wake:
                self._work()
            else:
                self._accept()
        for server in tuple(self._busy):
            if server in self._busy:  # another one may have had it dropped
                moved = self._guarded(server, server.advance) or moved
        for leftover in list(self._leftovers):
            if not self._tended(leftover):
                self._leftovers.pop(leftover, None)
                moved = True
        return moved

    def _tended(self, leftover: Leftover) -> bool:
        try:
            return leftover.tend()
        except Exception:
            log.exception("unexpected error of the nixl transport; please report it")
            leftover.abandon()
            return False

    def _guarded(self, server: Server, function: Callable[[], bool | None]) -> bool:
        try:
            moved = bool(function())
            if moved:
                server.last = time.monotonic()
            self._look_after(server)
            return moved
        except Ended as error:
            self._drop(server, str(error))
        except Exception as error:
            log.exception("unexpected error of the nixl transport; please report it")
            self._drop(server, repr(error))
        return True

    def _look_after(self, server: Server) -> None:
        if server.unsent is not server.watched:
            server.watched = server.unsent
            events = select.EPOLLIN | (select.EPOLLOUT if server.watched else 0)
            self._epoll.modify(server.fileno(), events)
        if server.busy:
            self._busy[server] = None
        else:
            self._busy.pop(server, None)

    def _work(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while self._calls:
            function = self._calls.popleft()
            try:
                function()
            except Exception:
                log.exception("unexpected error of the nixl transport; please report it")

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            log.warning("a connection was not accepted: %s", error)
            time.sleep(0.01)  # such as no descriptor: the kernel says so again at once
            return
        try:
            self._admit(sock)
        except OSError as error:
            log.warning("a connection was not accepted: %s", error)
            sock.close()

    def _admit(self, sock: socket.socket) -> None:
        if not _may_ask(sock):
            log.warning("a process of another user wanted to connect: refused")
            sock.close()
            return
        strangers = [server for server in self._servers.values() if not server.greeted]
        for server in strangers:
            old = time.monotonic() - server.begun > STRANGER_SECONDS
            if old or len(strangers) >= MAX_STRANGERS:
                self._drop(server, "it has not shown the greeting of an offer")
        stream = Stream(_quick(sock), GREETING)
        server = Server(stream, self._greet, self.sides, self._make_agent)
        self._epoll.register(server.fileno(), select.EPOLLIN)
        self._servers[server.fileno()] = server

    def _greet(self, greeting: bytes) -> bytes:
        """Whose it is. A process that makes more and more connections loses its oldest ones."""
        peer = self.greetings.peer_of(greeting)
        if peer is None:
            raise WireError("it does not begin with the greeting of an offer")
        others = [server for server in self._servers.values() if server.peer == peer]
        for server in others[: max(0, len(others) + 1 - MAX_OF_PEER)]:
            reason = f"its process has made {MAX_OF_PEER} newer ones"
            log.warning("a connection of an asker is closed: %s", reason)
            self._drop(server, reason)
        return peer

    def _drop(self, server: Server, reason: str) -> None:
        """End a connection."""
        log.debug("the connection of an asker has ended: %s", reason)
        self._busy.pop(server, None)
        fd = server.fileno()
        if self._servers.pop(fd, None) is not None:
            self._epoll.unregister(fd)
            server.close()


def _listen(address: str | None) -> tuple[socket.socket, str]:
    """A listener, and its address for offers."""
    if address is None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        name = f"datadist-nixl-{os.urandom(12).hex()}"
        where, text = f"\0{name}", f"unix:{name}"
    else:
        info = socket.getaddrinfo(
            address, 0, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_PASSIVE
        )[0]
        sock = socket.socket(info[0], socket.SOCK_STREAM)
        where, text = info[4], ""  # type: ignore[assignment]
    try:
        sock.bind(where)
        sock.listen(BACKLOG)
        sock.setblocking(False)
        return sock, text or f"tcp:{address}|{sock.getsockname()[1]}"
    except BaseException:
        sock.close()
        raise


def connect(address: str) -> socket.socket:
    """A connection to a listener of an offer, which may still be on its way. Raises ``OSError``."""
    family, _, name = address.partition(":")
    if family == "unix":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        where: object = f"\0{name}"
    else:
        host, _, port = name.rpartition("|")
        info = socket.getaddrinfo(
            host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )[0]
        sock = socket.socket(info[0], socket.SOCK_STREAM)
        where = info[4]
    try:
        sock.setblocking(False)
        _quick(sock)
        try:
            sock.connect(where)  # type: ignore[arg-type]
        except BlockingIOError:
            if family == "unix":  # its backlog is full; TCP goes on with it
                raise
        return sock
    except BaseException:
        sock.close()
        raise


def _quick(sock: socket.socket) -> socket.socket:
    if sock.family != socket.AF_UNIX:
        for level, name, value in TCP_OPTIONS:
            sock.setsockopt(level, name, value)
    return sock


def _may_ask(sock: socket.socket) -> bool:
    """Over a Unix socket, processes of our user and of root."""
    if sock.family != socket.AF_UNIX:
        return True
    _, user, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return user in (0, os.geteuid())

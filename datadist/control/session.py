"""One connection to one peer engine: framed messages with descriptors, and its end."""

from __future__ import annotations

import array
import logging
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from datadist.control.messages import HEADER, MAX_FDS, MAX_FRAME, Message, decode, encode
from datadist.control.process import peer_of
from datadist.control.reactor import READ, WRITE, Reactor

log = logging.getLogger("datadist.control")

MAX_QUEUED = 256 << 20
"""Bytes that may wait for a peer that does not read; above, the session is given up."""
CHUNK = 1 << 18
"""Bytes read at once."""


def close_all(fds: Iterable[int]) -> None:
    """Close every descriptor."""
    for fd in fds:
        os.close(fd)


class Descriptor:
    """A descriptor that closes with the last reference to this object."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


class Session:
    """A connected socket, read on the reactor; :meth:`send` works from any thread.

    ``peer_pid`` and ``peer_uid`` are the kernel's word (SO_PEERCRED). ``on_message(session,
    message, fds)`` owns the descriptors it is given; ``on_closed(session, reason)`` comes once.

    This is the session of two processes on one host. :class:`~datadist.control.tcp.TcpSession` is
    the one over the network: no pid, no descriptors, an ``address``.
    """

    peer_pid: int | None = None
    peer_uid: int | None = None
    process: Descriptor | None = None
    """The peer's process, until the session is closed; links keep a reference for longer."""
    address: str | None = None
    """The peer's network address, where it was met over the network."""

    def __init__(self, reactor: Reactor, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._arrivals = select.epoll()  # asked often: a third of the time of FIONREAD
        self._arrivals.register(sock, select.EPOLLIN)
        self._reactor = reactor
        self._identify()
        self.incarnation = ""
        self.cluster_id = -1
        self.program = ""
        """What runs at the other end, for people."""
        self.closed = False
        self.orderly = False
        self.limit = MAX_FRAME
        """Largest frame that is accepted."""
        self.on_message: Callable[[Session, Message, list[int]], None] | None = None
        self.on_closed: Callable[[Session, str], None] | None = None
        self.dispatching = False
        """Whether something that arrived is being handled."""
        self._inbox = bytearray()
        self._fds: deque[int] = deque()
        self._outbox: deque[tuple[memoryview, list[int]]] = deque()
        self._queued = 0
        self._send_lock = threading.Lock()

    @property
    def peer(self) -> str:
        """The process at the other end, for people."""
        return f"pid {self.peer_pid}"

    @property
    def who(self) -> str:
        """The same, with the program that runs there."""
        return f"{self.peer}, {self.program}" if self.program else self.peer

    @property
    def takes_descriptors(self) -> bool:
        """Whether :meth:`send` can pass descriptors."""
        return True

    @property
    def control_fd(self) -> int:
        """The socket's descriptor: readable when something has arrived, also the end."""
        return self._sock.fileno()

    def _identify(self) -> None:
        self.peer_pid, self.peer_uid = peer_of(self._sock)
        self.process = Descriptor(os.pidfd_open(self.peer_pid))

    def start(self) -> None:
        """Begin to read; on the reactor's thread."""
        self._reactor.watch(self._sock.fileno(), READ, self._on_events)
        if self.process is not None:
            self._reactor.watch(self.process.fd, READ, self._on_exit)

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send or queue; never blocks. Owns ``fds``, whatever comes. Silent on a closed session.

        Raises ``ValueError`` for a message that exceeds a frame.
        """
        try:
            frame = encode(message)
        except BaseException:
            close_all(fds)
            raise
        with self._send_lock:
            if self.closed:
                close_all(fds)
                return
            data = memoryview(self._seal(frame))
            self._outbox.append((data, list(fds)))
            self._queued += len(data)
            broken = self._flush()
            waiting = bool(self._outbox)
        if broken or self._queued > MAX_QUEUED:
            why = broken or f"it left {self._queued} bytes unread"
            self._reactor.post(lambda: self._give_up(why))
        elif waiting:
            self._reactor.post(self._update_events)

    def settled(self) -> bool:
        """Whether everything that arrived so far has been handled; from any thread."""
        if self.closed:
            return True
        try:
            waiting = self._arrivals.poll(0, 1)
        except (OSError, ValueError):  # closed meanwhile
            return True
        return not waiting and not self.dispatching

    def drain(self) -> None:
        """Handle what has arrived, on the reactor's thread."""
        if not self.closed:
            self._on_events(READ)

    def close(self, reason: str) -> None:
        """Close and report once, on the reactor's thread; unsent frames are dropped."""
        with self._send_lock:
            if self.closed:
                return
            self.closed = True
            pending = [fd for _, fds in self._outbox for fd in fds]
            self._outbox.clear()
        self._reactor.unwatch(self._sock.fileno())
        if self.process is not None:
            self._reactor.unwatch(self.process.fd)
        self._arrivals.close()
        self._sock.close()
        close_all([*pending, *self._fds])
        self._fds.clear()
        try:
            if self.on_closed is not None:
                self.on_closed(self, reason)
        finally:
            self.process = None

    def abandon(self) -> None:
        """In a forked child: close the socket, without locks, which other threads may have held."""
        self.closed = True
        self._arrivals.close()
        self._sock.close()

    def unsent(self) -> bool:
        """Whether frames wait for the peer to read."""
        return bool(self._outbox)

    def _flush(self) -> str | None:
        while self._outbox:
            data, fds = self._outbox[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            try:
                sent = self._sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return None
            except OSError as error:
                return self._explain("sending", error)
            close_all(fds)
            self._queued -= sent
            if sent < len(data):
                self._outbox[0] = (data[sent:], [])
            else:
                self._outbox.popleft()
        return None

    def _update_events(self) -> None:
        if not self.closed:
            events = READ | WRITE if self._outbox else READ
            self._reactor.watch(self._sock.fileno(), events, self._on_events)

    def _on_events(self, events: int) -> None:
        if events & WRITE:
            with self._send_lock:
                broken = self._flush()
            if broken:
                self._give_up(broken)
                return
            self._update_events()
        if events & READ:
            self.dispatching = True
            try:
                self._receive()
            finally:
                self.dispatching = False

    def _give_up(self, reason: str) -> None:
        self.drain()  # a goodbye that lies there says more than the failure to send
        self.close(reason)

    def _on_exit(self, _events: int) -> None:
        self.drain()  # what the peer said before it ended still counts
        self.close("its process ended")

    def _receive(self) -> None:
        reason: str | None = None
        while reason is None:
            try:
                data, fds, flags = self._receive_some()
            except BlockingIOError:
                break
            except OSError as error:
                reason = self._explain("receiving", error)
                break
            self._fds.extend(fds)
            if flags & socket.MSG_CTRUNC:
                reason = "descriptors it sent were lost (is the descriptor limit reached here?)"
            elif not data:
                reason = "it closed the connection"
            else:
                self._inbox += data
                reason = self._dispatch()
            if self.closed:
                return
        if reason is not None:
            self.close(reason)

    def _receive_some(self) -> tuple[bytes, list[int], int]:
        data, fds, flags, _ = socket.recv_fds(self._sock, CHUNK, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
        return data, fds, flags

    def _dispatch(self) -> str | None:
        start = 0
        view = self._inbox
        while len(view) - start >= HEADER.size:
            (size,) = HEADER.unpack_from(view, start)
            if size > self.limit:
                return f"it sent a frame of {size} bytes, more than {self.limit}"
            end = start + HEADER.size + size
            if len(view) < end + self._tag_size:
                break
            if not self._unseal(view, start, end):
                return "a frame was changed, repeated or lost on the way (its MAC is wrong)"
            try:
                message = decode(view[start + HEADER.size : end])
            except ValueError as error:
                return f"it sent a frame that is not valid: {error}"
            start = end + self._tag_size
            fds = self._take_fds(message)
            if fds is None:
                return "it sent fewer descriptors than it said"
            if self.on_message is not None:
                self.on_message(self, message, fds)
            if self.closed:
                return None
        del self._inbox[:start]
        if len(self._fds) > MAX_FDS:  # those of one frame may be ahead of its last bytes
            return "it sent descriptors that no message names"
        return None

    def _take_fds(self, message: Message) -> list[int] | None:
        count = message.fds if message.kind == "offer" else 0
        if len(self._fds) < count:
            return None
        return [self._fds.popleft() for _ in range(count)]

    # What a session over the network does differently: see TcpSession.

    _tag_size = 0

    def _seal(self, frame: bytes) -> bytes:
        return frame

    def _unseal(self, inbox: bytearray, start: int, end: int) -> bool:
        return True

    def _explain(self, doing: str, error: OSError) -> str:
        return f"{doing} failed: {error}"

    def __repr__(self) -> str:
        return f"Session(cluster {self.cluster_id}, {self.peer})"

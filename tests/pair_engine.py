"""A tiny engine over Unix sockets, for tests of :mod:`datadist.messaging`, with faults on demand.

Each engine listens on an abstract name. An endpoint is one connection, which carries frames of 4 bytes
of length, one of kind (message or put) and the content. ``Faults`` decides what happens to each
message that an endpoint is to send.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from datadist.messaging import (
    Arrived,
    Completed,
    Endpoint,
    Engine,
    EngineError,
    EngineEvent,
    Lost,
    MessagingTransport,
)
from datadist.transport import Availability, OptionError, TransportOptions

FRAME = struct.Struct("=IB")
TARGET = struct.Struct("=QQ")
MESSAGE, PUT = 0, 1
CHUNK = 1 << 18

Fault = Callable[[bytearray], Iterable[bytearray]]
"""From a message to those that are sent in its place."""


@dataclass
class Faults:
    """What goes wrong in an engine; nothing by default."""

    on_send: Fault = lambda message: (message,)
    never_complete: bool = False
    hold: bool = False
    """Send nothing for now."""
    sent: list[bytes] = field(default_factory=list)
    """Heads of what was to be sent."""


@dataclass(eq=False)
class PairEndpoint(Endpoint):
    """One direction of a connection: only who has connected sends on it."""

    engine: PairEngine
    sock: socket.socket
    queue: deque[tuple[memoryview, object]] = field(default_factory=deque)
    """What is to be sent, with its token at the end of each message."""

    def send(self, message: bytearray, token: object) -> None:
        faults = self.engine.faults
        faults.sent.append(bytes(message[:32]))
        self._queue(MESSAGE, list(faults.on_send(message)), token)

    def put(self, data: bytearray, target: bytes, token: object) -> None:
        self._queue(PUT, [bytearray(target + data)], token)

    def _queue(self, kind: int, messages: list[bytearray], token: object) -> None:
        for content in messages:
            self.queue.append((memoryview(FRAME.pack(len(content), kind)), None))
            self.queue.append((memoryview(content), None))
        self.queue.append((memoryview(b""), token))
        self.engine.waiting.add(self)

    def flush(self) -> Iterator[EngineEvent]:
        """Send what the socket takes."""
        while self.queue and not self.engine.faults.hold:
            view, token = self.queue[0]
            while view:
                try:
                    view = view[self.sock.send(view[:CHUNK]) :]
                except BlockingIOError:
                    self.queue[0] = view, token
                    self.engine.poller.modify(self.sock, select.EPOLLIN | select.EPOLLOUT)
                    return
                except OSError as error:
                    self.queue.clear()
                    yield Lost(self, str(error))
                    return
            self.queue.popleft()
            if token is not None and not self.engine.faults.never_complete:
                yield Completed(token)
        if not self.queue:
            self.engine.waiting.discard(self)

    def close(self) -> None:
        self.engine.forget(self)


@dataclass(eq=False)
class _Incoming:
    sock: socket.socket
    data: bytearray = field(default_factory=bytearray)


class PairEngine(Engine):
    """See the text of this module."""

    piece: ClassVar[int] = 1 << 18
    window: ClassVar[int] = 4

    def __init__(self) -> None:
        self.faults = Faults()
        self.poller = select.epoll()
        self.waiting: set[PairEndpoint] = set()
        """Endpoints with something to send."""
        self.endpoints: dict[int, PairEndpoint] = {}
        self.incoming: dict[int, _Incoming] = {}
        self.exposed: dict[int, bytearray] = {}
        self.polls = 0
        self._listener = self.listen()
        self._listener.setblocking(False)
        self.poller.register(self._listener, select.EPOLLIN)

    def listen(self) -> socket.socket:
        """The socket that peers connect to."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(b"\0datadist-pair-" + os.urandom(8).hex().encode())
        listener.listen(64)
        return listener

    def dial(self, address: bytes) -> socket.socket:
        """A connection to the socket of a peer. Raises ``OSError``."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(address)
        except OSError:
            sock.close()
            raise
        return sock

    @property
    def address(self) -> bytes:
        return bytes(self._listener.getsockname())

    def connect(self, address: bytes) -> PairEndpoint:
        try:
            sock = self.dial(address)
        except OSError as error:
            raise EngineError(str(error)) from None
        sock.setblocking(False)
        endpoint = self.endpoints[sock.fileno()] = PairEndpoint(self, sock)
        self.poller.register(sock, select.EPOLLIN)
        return endpoint

    def forget(self, endpoint: PairEndpoint) -> None:
        """The endpoint is closed."""
        if self.endpoints.pop(endpoint.sock.fileno(), None) is not None:
            self.poller.unregister(endpoint.sock)
            endpoint.sock.close()
        self.waiting.discard(endpoint)

    def fileno(self) -> int | None:
        return self.poller.fileno()

    def poll(self) -> Iterable[EngineEvent]:
        self.polls += 1
        for fd, _ in self.poller.poll(0, 16):
            if fd == self._listener.fileno():
                sock, _ = self._listener.accept()
                sock.setblocking(False)
                self.incoming[sock.fileno()] = _Incoming(sock)
                self.poller.register(sock, select.EPOLLIN)
            elif fd in self.endpoints:
                yield from self._endpoint_ready(self.endpoints[fd])
            elif fd in self.incoming:
                yield from self._receive(self.incoming[fd])
        for endpoint in list(self.waiting):
            yield from endpoint.flush()

    def _endpoint_ready(self, endpoint: PairEndpoint) -> Iterator[EngineEvent]:
        try:
            ended = endpoint.sock.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            ended = False
        except OSError:
            ended = True
        if ended:
            self.poller.unregister(endpoint.sock)
            self.poller.register(endpoint.sock, 0)
            yield Lost(endpoint, "it has closed the connection")
        else:
            self.poller.modify(endpoint.sock, select.EPOLLIN)

    def _receive(self, incoming: _Incoming) -> Iterator[EngineEvent]:
        try:
            data = incoming.sock.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            del self.incoming[incoming.sock.fileno()]
            self.poller.unregister(incoming.sock)
            incoming.sock.close()
            return
        incoming.data += data
        while len(incoming.data) >= FRAME.size:
            size, kind = FRAME.unpack_from(incoming.data)
            if len(incoming.data) < FRAME.size + size:
                return
            content = incoming.data[FRAME.size : FRAME.size + size]
            del incoming.data[: FRAME.size + size]
            if kind == MESSAGE:
                yield Arrived(content)
            else:
                self._land(content)

    def _land(self, content: bytearray) -> None:
        key, _ = TARGET.unpack_from(content)
        if key in self.exposed:
            data = content[TARGET.size :]
            self.exposed[key][: len(data)] = data

    def expose(self, buffer: bytearray) -> bytes:
        key = id(buffer)
        self.exposed[key] = buffer
        return TARGET.pack(key, 0)

    def withdraw(self, target: bytes) -> None:
        del self.exposed[TARGET.unpack(target)[0]]

    def close(self) -> None:
        for incoming in self.incoming.values():
            incoming.sock.close()
        for endpoint in list(self.endpoints.values()):
            endpoint.close()
        self._listener.close()
        self.poller.close()


class PuttingEngine(PairEngine):
    """Puts the data of reads."""

    puts: ClassVar[bool] = True


class PolledEngine(PairEngine):
    """Has no descriptor to wait on."""

    def fileno(self) -> int | None:
        return None


class PairTransport(MessagingTransport):
    """The transport; processes of one host."""

    api_version: ClassVar[int] = 2
    same_host_only = True
    engine_class: ClassVar[type[PairEngine]] = PairEngine

    @classmethod
    def probe(cls) -> Availability:
        return Availability(True, "Unix sockets of this host")

    def make_engine(self, options: TransportOptions) -> PairEngine:
        if options.extra:
            raise OptionError(f"unknown option {min(options.extra)}: there are none")
        self.engine = self.engine_class()
        return self.engine


class PuttingTransport(PairTransport):
    """See :class:`PuttingEngine`."""

    engine_class = PuttingEngine


class PolledTransport(PairTransport):
    """See :class:`PolledEngine`."""

    engine_class = PolledEngine

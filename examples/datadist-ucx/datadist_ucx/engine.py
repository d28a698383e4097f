"""UCX as an engine of messages: a worker that receives, one that sends, and an endpoint per peer process.

UCX makes a pair of two endpoints that two workers have made to each other, by their numbers. Where one
end closes its own, the other one is reset, or loses messages, also if it belongs to a newer session.
So connections are made by a worker whose address nobody has, to the one that receives: none has a
counterpart that the peer can close. UCX keeps what it made for one at the receiver until the sender's
engine ends. So there is one per peer process, which stays.

Messages are UCX's tagged ones. Each endpoint sends with a tag that it has drawn. So who receives knows
which messages are of one sender, and no other process can send in its name. It looks for messages of any
size (a probe), and takes them from UCX's queue by their handles. The data of large ones follows later, or
not at all while the sender is stopped: the messages of each sender are reported in their order, and those
of one sender do not wait for those of another.
"""

from __future__ import annotations

import secrets
import select
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from datadist.messaging import (
    Arrived,
    Completed,
    Endpoint,
    Engine,
    EngineError,
    EngineEvent,
    Lost,
)

ANY = 0
"""As a tag and as a mask: the tag of any sender."""
MAX_RECEIVING = 3
"""Messages of one sender that are received at a time; others wait in UCX, large ones at the sender."""
LARGE = 64 << 10
"""Messages from so many bytes on are received into buffers that are used again."""
MAX_LARGE = 64
"""Large ones of all senders that are received at a time: a process may send with any number of tags."""
MAX_SPARE = 8
CLOSE_NANOSECONDS = 1_000_000
CLOSE_STEPS = 50
GONE = "the connection is gone"


class _Connection:
    """UCX's endpoint of a peer process, which those of its sessions use one after another."""

    def __init__(self, engine: UcxEngine, address: bytes) -> None:
        ucx = engine.ucx
        self.endpoints: set[UcxEndpoint] = set()
        self._engine = engine
        self._ucx: Any = ucx.UCXEndpoint.create_from_worker_address(
            engine.sender, ucx.UCXAddress.create_from_buffer(address), True
        )
        self._ucx.set_close_callback(engine.closed.append, (self,))

    @property
    def alive(self) -> bool:
        """Whether UCX has seen no end of it."""
        return self._ucx is not None and bool(self._ucx.alive)

    def send(self, message: bytearray, tag: Any) -> Any:
        """Begin to send; the request."""
        if self._ucx is None:
            raise EngineError(GONE)
        return self._ucx.tag_send(self._engine.array(message), tag)

    def close(self) -> None:
        """Close it before the call returns, which takes microseconds, unless something is being sent.

        UCX's ``close`` ends later. It keeps the whole context if the peer has gone meanwhile; but
        ``close_blocking`` cancels what is being sent, and may crash then.
        """
        ucx, self._ucx = self._ucx, None  # its callback refers to us
        if ucx is None:
            return
        if ucx.alive and any(sending.connection is self for sending in self._engine.sending):
            ucx.close()
        else:
            ucx.close_blocking(CLOSE_NANOSECONDS, CLOSE_STEPS)


class UcxEndpoint(Endpoint):
    """See :class:`datadist.messaging.Endpoint`."""

    def __init__(self, engine: UcxEngine, connection: _Connection) -> None:
        self._engine = engine
        self._connection = connection
        self._tag = engine.ucx.UCXXTag(secrets.randbits(64))
        connection.endpoints.add(self)

    def send(self, message: bytearray, token: object) -> None:
        """Begin to send; the request keeps the message."""
        engine = self._engine
        try:
            request = self._connection.send(message, self._tag)
        except engine.ucx.UCXError as error:
            raise EngineError(str(error)) from None
        engine.sending.append(_Sending(self, self._connection, request, message, token))

    def problem(self) -> str | None:
        """Whether UCX has seen the end of the connection."""
        return None if self._connection.alive else GONE

    def close(self) -> None:
        """The connection stays for later endpoints, unless something is still being sent.

        That says that it is stuck, or the peer is: then nothing new begins over it.
        """
        connection, engine = self._connection, self._engine
        connection.endpoints.discard(self)
        if any(sending.endpoint is self for sending in engine.sending):
            engine.give_up(connection)
        engine.close_given_up()


@dataclass(eq=False)
class _Sending:
    """A message that UCX has not sent."""

    endpoint: UcxEndpoint
    connection: _Connection
    request: Any
    message: bytearray
    token: object


@dataclass(eq=False)
class _Incoming:
    """A message that was found; its data is received once there is a request."""

    probe: Any
    buffer: bytearray | None = None
    request: Any = None


class UcxEngine(Engine):
    """See :class:`datadist.messaging.Engine`.

    Few large pieces: each one costs a round trip of UCX's rendezvous.
    """

    piece = 2 << 20
    window = 3

    def __init__(self, context: Any) -> None:
        from ucxx._lib import libucxx
        from ucxx._lib.arr import Array

        self.ucx, self.array = libucxx, Array
        self._any = libucxx.UCXXTag(ANY), libucxx.UCXXTagMask(ANY)
        self._worker, self.sender = (libucxx.UCXWorker(context, False, False) for _ in range(2))
        self._poller = select.epoll()
        for worker in self._workers:
            worker.init_blocking_progress_mode()
            self._poller.register(worker.epoll_file_descriptor, select.EPOLLIN)
        self._address: bytes = self._worker.address.tobytes()
        self._connections: dict[bytes, _Connection] = {}
        """Those for new endpoints, by the peer's address."""
        self._given_up: set[_Connection] = set()
        self.closed: list[_Connection] = []
        """Those whose end UCX has reported: those of a peer that has gone may come later, or not."""
        self.sending: list[_Sending] = []
        self._incoming: dict[int, deque[_Incoming]] = {}
        """By the sender's tag."""
        self._large = 0
        """Large messages that are being received."""
        self._spare: list[bytearray] = []
        self._reported: list[bytearray] = []
        """Buffers of messages that the base has, until it polls again."""

    @property
    def _workers(self) -> tuple[Any, Any]:
        return self._worker, self.sender

    @property
    def address(self) -> bytes:
        """That of the worker that receives."""
        return self._address

    def connect(self, address: bytes) -> UcxEndpoint:
        """Make an endpoint; UCX connects as it makes progress."""
        for each in [each for each in self._connections.values() if not each.alive]:
            self.give_up(each)
        self.close_given_up()
        connection = self._connections.get(address)
        if connection is None:
            try:
                connection = self._connections[address] = _Connection(self, address)
            except self.ucx.UCXError as error:
                raise EngineError(str(error)) from None
        return UcxEndpoint(self, connection)

    def give_up(self, connection: _Connection) -> None:
        """Use it for no new endpoint; it is closed after its last one."""
        for address in [key for key, each in self._connections.items() if each is connection]:
            del self._connections[address]
        self._given_up.add(connection)

    def close_given_up(self) -> None:
        """Those that nobody uses, and those that are gone."""
        for each in [each for each in self._given_up if not (each.alive and each.endpoints)]:
            self._given_up.discard(each)
            each.close()

    def fileno(self) -> int:
        """Readable when a worker has something to do; see :meth:`poll`."""
        return self._poller.fileno()

    def poll(self) -> list[EngineEvent]:
        """Make progress; arm the descriptors before nothing is returned."""
        self._spare = [*self._spare, *self._reported][:MAX_SPARE]
        self._reported = []
        while True:
            for worker in self._workers:
                worker.progress()
            found = self._find()
            events = [*self._lost(), *self._completed(), *self._arrived()]
            if events or (not found and all(worker.arm() for worker in self._workers)):
                return events

    def _lost(self) -> Iterator[EngineEvent]:
        closed, self.closed = self.closed, []
        for connection in closed:
            yield from [Lost(endpoint, GONE) for endpoint in connection.endpoints]

    def _completed(self) -> Iterator[EngineEvent]:
        left = []
        for each in self.sending:
            if each.request.completed:
                yield Completed(each.token, self._error(each.request))
            else:
                left.append(each)
        self.sending = left

    def _find(self) -> bool:
        """Take messages from UCX's queue, and whether there was one."""
        found = False
        while (probe := self._worker.tag_probe(*self._any, remove=True)).matched:
            found = True
            queue = self._incoming.setdefault(probe.sender_tag, deque())
            queue.append(_Incoming(probe))
            self._receive(queue)
        return found

    def _receive(self, queue: deque[_Incoming]) -> None:
        """Receive the first messages of a sender."""
        for incoming in islice(queue, MAX_RECEIVING):
            if incoming.request is None:
                # Nobody sends more than that in good faith; UCX ends the receive with an error.
                size = min(incoming.probe.length, self.max_message)
                if size >= LARGE and self._large >= MAX_LARGE:
                    return
                self._large += size >= LARGE
                incoming.buffer = self._buffer(size)
                target = self.array(memoryview(incoming.buffer)[:size])
                incoming.request = self._worker.tag_recv_with_handle(target, incoming.probe)

    def _buffer(self, size: int) -> bytearray:
        if size < LARGE:
            return bytearray(size)
        return self._spare.pop() if self._spare else bytearray(self.max_message)

    def _arrived(self) -> Iterator[EngineEvent]:
        for tag, queue in list(self._incoming.items()):
            self._receive(queue)
            while queue and queue[0].request is not None and queue[0].request.completed:
                incoming = queue.popleft()
                size = min(incoming.probe.length, self.max_message)
                self._large -= size >= LARGE
                self._receive(queue)
                assert incoming.buffer is not None
                if size >= LARGE:
                    self._reported.append(incoming.buffer)
                if self._error(incoming.request) is None:
                    yield Arrived(memoryview(incoming.buffer)[:size])
            if not queue:
                del self._incoming[tag]

    def _error(self, request: Any) -> str | None:
        try:
            request.check_error()
        except self.ucx.UCXError as error:
            return str(error)
        return None

    def close(self) -> None:
        """Cancel what is left, and give the workers back."""
        self._poller.close()
        for worker in self._workers:
            worker.cancel_inflight_requests(CLOSE_NANOSECONDS, CLOSE_STEPS)
        for connection in (*self._connections.values(), *self._given_up):
            connection.close()
        self._connections.clear()
        self._given_up.clear()
        self.sending.clear()
        self._incoming.clear()
        self.closed.clear()
        self._worker = self.sender = None

"""UCX as an engine of messages: one worker, which listens, and an endpoint per peer process.

Messages are UCX's tagged ones. Each endpoint sends with a tag that it has drawn. So who receives knows
which messages are of one sender, and no other process can send in its name. It looks for messages of any
size (a probe), and takes them from UCX's queue by their handles. The data of large ones follows later, or
not at all while the sender is stopped: the messages of each sender are reported in their order, and those
of one sender do not wait for those of another.
"""

from __future__ import annotations

import secrets
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


class UcxEndpoint(Endpoint):
    """See :class:`datadist.messaging.Endpoint`."""

    def __init__(self, engine: UcxEngine, address: bytes) -> None:
        ucx = engine.ucx
        self._engine = engine
        self._ucx: Any = ucx.UCXEndpoint.create_from_worker_address(
            engine.worker, ucx.UCXAddress.create_from_buffer(address), True
        )
        self._tag = ucx.UCXXTag(secrets.randbits(64))
        self._ucx.set_close_callback(engine.lost.append, (Lost(self, "the connection is gone"),))

    def send(self, message: bytearray, token: object) -> None:
        """Begin to send; the request keeps the message."""
        engine = self._engine
        try:
            request = self._ucx.tag_send(engine.array(message), self._tag)
        except engine.ucx.UCXError as error:
            raise EngineError(str(error)) from None
        engine.sending.append((self, request, message, token))

    def problem(self) -> str | None:
        """Whether UCX has seen the end of the connection."""
        return None if self._ucx is not None and self._ucx.alive else "the connection is gone"

    def close(self) -> None:
        """Close it before the call returns, which takes microseconds, unless something is being sent.

        UCX's ``close`` ends later. It keeps the whole context if the peer has gone meanwhile; but
        ``close_blocking`` cancels what is being sent, and may crash then.
        """
        ucx, self._ucx = self._ucx, None  # its callback refers to us
        if ucx is None:
            return
        if ucx.alive and any(entry[0] is self for entry in self._engine.sending):
            ucx.close()
        else:
            ucx.close_blocking(CLOSE_NANOSECONDS, CLOSE_STEPS)
        self._engine.endpoints.discard(self)


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
        self.worker = libucxx.UCXWorker(context, False, False)
        self.worker.init_blocking_progress_mode()
        self._address: bytes = self.worker.address.tobytes()
        self.endpoints: set[UcxEndpoint] = set()
        self.lost: list[EngineEvent] = []
        self.sending: list[tuple[UcxEndpoint, Any, bytearray, object]] = []
        self._incoming: dict[int, deque[_Incoming]] = {}
        """By the sender's tag."""
        self._large = 0
        """Large messages that are being received."""
        self._spare: list[bytearray] = []
        self._reported: list[bytearray] = []
        """Buffers of messages that the base has, until it polls again."""

    @property
    def address(self) -> bytes:
        """The worker's."""
        return self._address

    def connect(self, address: bytes) -> UcxEndpoint:
        """Make an endpoint; UCX connects as it makes progress."""
        for closed in [each for each in self.endpoints if each.problem() is not None]:
            closed.close()
        try:
            endpoint = UcxEndpoint(self, address)
        except self.ucx.UCXError as error:
            raise EngineError(str(error)) from None
        self.endpoints.add(endpoint)
        return endpoint

    def fileno(self) -> int:
        """Readable when the worker has something to do; see :meth:`poll`."""
        return int(self.worker.epoll_file_descriptor)

    def poll(self) -> list[EngineEvent]:
        """Make progress; arm the descriptor before nothing is returned."""
        self._spare = [*self._spare, *self._reported][:MAX_SPARE]
        self._reported = []
        while True:
            self.worker.progress()
            found = self._find()
            lost, self.lost = self.lost, []
            events = [*lost, *self._completed(), *self._arrived()]
            if events or (not found and self.worker.arm()):
                return events

    def _completed(self) -> Iterator[EngineEvent]:
        left = []
        for entry in self.sending:
            if entry[1].completed:
                yield Completed(entry[3], self._error(entry[1]))
            else:
                left.append(entry)
        self.sending = left

    def _find(self) -> bool:
        """Take messages from UCX's queue, and whether there was one."""
        found = False
        while (probe := self.worker.tag_probe(*self._any, remove=True)).matched:
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
                incoming.request = self.worker.tag_recv_with_handle(target, incoming.probe)

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
        """Cancel what is left, and give the worker back."""
        self.worker.cancel_inflight_requests(CLOSE_NANOSECONDS, CLOSE_STEPS)
        for endpoint in list(self.endpoints):
            endpoint.close()
        self.sending.clear()
        self._incoming.clear()
        self.lost.clear()
        self.worker = None

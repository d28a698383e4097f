"""UCX as an engine of messages: one worker, which listens, and an endpoint per peer process.

Messages are UCX's tagged ones. Who receives looks for the next message of any size (a probe), and
takes it from the queue by its handle. The data of large ones follows later: they are reported in the
order in which they were found, which is the order of each sender.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
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

TAG = 1
MAX_RECEIVING = 16
"""Messages that are being received at a time; the others wait in UCX, large ones at the sender."""
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
        self._ucx.set_close_callback(engine.lost.append, (Lost(self, "the connection is gone"),))

    def send(self, message: bytearray, token: object) -> None:
        """Begin to send; the request keeps the message."""
        engine = self._engine
        try:
            request = self._ucx.tag_send(engine.array(message), engine.tag)
        except engine.ucx.UCXError as error:
            raise EngineError(str(error)) from None
        engine.sending.append((request, message, token))

    def problem(self) -> str | None:
        """Whether UCX has seen the end of the connection."""
        return None if self._ucx.alive else "the connection is gone"

    def close(self) -> None:
        """UCX closes it as it makes progress; ``close`` of one that failed would crash."""
        if self._ucx.alive:
            self._ucx.close()
        else:
            self.close_now()

    def close_now(self) -> None:
        """Close it before the call returns."""
        self._ucx.close_blocking(CLOSE_NANOSECONDS, CLOSE_STEPS)
        self._engine.endpoints.discard(self)


class UcxEngine(Engine):
    """See :class:`datadist.messaging.Engine`."""

    def __init__(self, context: Any) -> None:
        from ucxx._lib import libucxx
        from ucxx._lib.arr import Array

        self.ucx, self.array, self.tag = libucxx, Array, libucxx.UCXXTag(TAG)
        self.worker = libucxx.UCXWorker(context, False, False)
        self.worker.init_blocking_progress_mode()
        self._address: bytes = self.worker.address.tobytes()
        self.endpoints: set[UcxEndpoint] = set()
        """Also those that are being closed."""
        self.lost: list[EngineEvent] = []
        self.sending: list[tuple[Any, bytearray, object]] = []
        self._receiving: deque[tuple[Any, bytearray]] = deque()

    @property
    def address(self) -> bytes:
        """The worker's."""
        return self._address

    def connect(self, address: bytes) -> UcxEndpoint:
        """Make an endpoint; UCX connects as it makes progress."""
        for closed in [each for each in self.endpoints if each.problem() is not None]:
            closed.close_now()
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
        while True:
            while self.worker.progress_once():
                pass
            found = self._find()
            lost, self.lost = self.lost, []
            events = [*lost, *self._completed(), *self._arrived()]
            if events or (not found and self.worker.arm()):
                return events

    def _completed(self) -> Iterator[EngineEvent]:
        left = []
        for entry in self.sending:
            if entry[0].completed:
                yield Completed(entry[2], self._error(entry[0]))
            else:
                left.append(entry)
        self.sending = left

    def _find(self) -> bool:
        """Take messages from UCX's queue, and whether there was one."""
        found = False
        while len(self._receiving) < MAX_RECEIVING:
            probe = self.worker.tag_probe(self.tag, remove=True)
            if not probe.matched:
                break
            found = True
            # Nobody sends more than that in good faith; UCX ends the receive with an error.
            buffer = bytearray(min(probe.length, self.max_message))
            request = self.worker.tag_recv_with_handle(self.array(buffer), probe)
            self._receiving.append((request, buffer))
        return found

    def _arrived(self) -> Iterator[EngineEvent]:
        while self._receiving and self._receiving[0][0].completed:
            request, buffer = self._receiving.popleft()
            if self._error(request) is None:
                yield Arrived(buffer)

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
            endpoint.close_now()
        self.sending.clear()
        self._receiving.clear()
        self.lost.clear()
        self.worker = None

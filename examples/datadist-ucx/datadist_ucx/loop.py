"""A UCX worker and the thread that drives it, with waits that end.

A worker may be used by one thread at a time, which a lock sees to. Its buffers belong to this module
until the worker is gone: UCX may still fill a receive that nobody waits for any more, so callers never
hand in memory of a cache.
"""

from __future__ import annotations

import os
import select
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Buffer

CLOSE_SECONDS = 5.0
CLOSE_STEPS = 50


class Ended(Exception):
    """The endpoint's peer is gone, or the loop was closed."""


class Loop:
    """One worker, which listens on the context's devices and talks to any number of endpoints."""

    def __init__(self, context: Any) -> None:
        from ucxx._lib import libucxx

        self._ucx = libucxx
        self._worker = libucxx.UCXWorker(context, False, False)
        self._worker.init_blocking_progress_mode()
        self.address: bytes = self._worker.address.tobytes()
        self._lock = threading.Lock()
        self.changed = threading.Condition()
        """Notified when requests may have completed, and by those who set what a wait looks at."""
        self._posted: list[tuple[Any, object]] = []
        self._endpoints: list[Any] = []
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="datadist-ucx", daemon=True)
        try:
            self._thread.start()
        except BaseException:
            os.close(self._wake)
            raise

    def connect(self, address: bytes) -> Any:
        """An endpoint of a worker elsewhere. Raises :class:`Ended` if it is seen to be gone."""
        try:
            with self._lock:
                endpoint = self._ucx.UCXEndpoint.create_from_worker_address(
                    self._worker, self._ucx.UCXAddress.create_from_buffer(address), True
                )
        except self._ucx.UCXError as error:
            raise Ended(str(error)) from None
        self._endpoints.append(endpoint)
        return endpoint

    def send(self, endpoint: Any, data: Buffer, tag: int) -> Any:
        """Begin to send; the request."""
        from ucxx._lib.arr import Array

        return self._post(lambda: endpoint.tag_send(Array(data), self._ucx.UCXXTag(tag)), data)

    def receive(self, buffer: Buffer, tag: int) -> Any:
        """Begin to receive a message that fills ``buffer``; the request."""
        from ucxx._lib.arr import Array

        return self._post(
            lambda: self._worker.tag_recv(Array(buffer), self._ucx.UCXXTag(tag)), buffer
        )

    def _post(self, begin: Any, buffer: object) -> Any:
        with self._lock:
            if self._closed:
                raise Ended("this link is closed")
            self._posted = [entry for entry in self._posted if not entry[0].completed]
            try:
                request = begin()
            except self._ucx.UCXError as error:
                raise Ended(str(error)) from None
            self._posted.append((request, buffer))
            os.eventfd_write(self._wake, 1)
        return request

    def wait(self, request: Any, endpoint: Any, deadline: float | None, ended: Any) -> None:
        """Until a request has completed.

        Raises ``TimeoutError`` at ``deadline`` (time.monotonic), and :class:`Ended` when the peer is
        gone, the loop is closed, or ``ended()`` gives a reason.
        """
        with self.changed:
            while not request.completed:
                reason = ended() or ("this link is closed" if self._closed else None)
                if reason is None and not endpoint.alive:
                    reason = "the connection is gone"
                if reason is not None:
                    raise Ended(reason)
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError
                self.changed.wait(left)
        try:
            request.check_error()
        except self._ucx.UCXError as error:
            raise Ended(str(error)) from None

    def _run(self) -> None:
        with select.epoll() as poller:
            poller.register(self._worker.epoll_file_descriptor, select.EPOLLIN)
            poller.register(self._wake, select.EPOLLIN)
            while not self._closed:
                with self._lock:
                    while self._worker.progress_once():
                        pass
                    armed = self._worker.arm()
                with self.changed:
                    self.changed.notify_all()
                if armed and any(fd == self._wake for fd, _ in poller.poll()):
                    os.eventfd_read(self._wake)

    def stop(self) -> None:
        """End all waits, now and later."""
        with self.changed:
            self._closed = True
            self.changed.notify_all()
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Give the worker back; :meth:`stop` came before, and nobody uses the loop any more."""
        self._thread.join(CLOSE_SECONDS)
        with self._lock:
            self._worker.cancel_inflight_requests(1_000_000, CLOSE_STEPS)
            for endpoint in self._endpoints:
                endpoint.close_blocking(1_000_000, CLOSE_STEPS)
            self._posted.clear()
            self._endpoints.clear()
            self._worker = None
        os.close(self._wake)

"""The one thread of a transport: it drives the engine, and runs what other threads have for it."""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

from datadist.base import threads
from datadist.base.calls import entry
from datadist.base.flag import Flag
from datadist.messaging.engine import Engine, EngineEvent

__all__ = ["Handler", "Loop", "LoopEnded"]

T = TypeVar("T")

log = logging.getLogger("datadist.messaging")

STOP_SECONDS = 5.0
RETRY_SECONDS = 0.5
"""After a tick that failed."""
SPIN_SECONDS = 0.002
"""So long after the last event an engine without descriptor is polled without a pause."""
POLL_SECONDS = 0.001
IDLE_POLL_SECONDS = 0.005
MAX_CALLS = 64
"""Calls of other threads between two polls."""


class LoopEnded(Exception):
    """The thread has ended, or did not answer in time; the text says why."""


class Handler(Protocol):
    """What the loop calls, on its thread."""

    def event(self, event: EngineEvent) -> None:
        """Something has happened in the engine."""

    def tick(self) -> float | None:
        """Look at times; returns the seconds until the next tick, or None if nothing has a time."""

    def fail(self, reason: str) -> None:
        """The loop ends."""


class Loop:
    """Polls the engine; sleeps while nothing happens, if the engine has a descriptor."""

    def __init__(self, engine: Engine, handler: Handler) -> None:
        self._engine = engine
        self._handler = handler
        self._calls: deque[Callable[[], None]] = deque()
        self._waking, self._woken = socket.socketpair()
        self._sleeping = False
        self._stopping = False
        self._watched: dict[int, Callable[[], None]] = {}
        self._tick_at: float | None = None
        self._last_event = 0.0
        self.ended: str | None = None
        """Why the thread does nothing any more."""
        self._thread = threading.Thread(target=self._run, name="datadist-messaging", daemon=True)
        try:
            self._waking.setblocking(False)
            self._woken.setblocking(False)
            self._poller = select.epoll()
        except BaseException:
            self._close_sockets()
            raise

    def start(self) -> None:
        """Start the thread. Raises ``RuntimeError`` where none can be started."""
        try:
            threads.start(self._thread)
        except BaseException:
            self.ended = "its thread was not started"
            self._poller.close()
            self._close_sockets()
            raise

    def call(self, function: Callable[[], None]) -> None:
        """Run a function on the thread, soon. From any thread; never blocks."""
        self._calls.append(function)
        if self._sleeping:
            with contextlib.suppress(OSError):  # it is awake, or has ended
                self._waking.send(b"!")

    def ask(self, function: Callable[[], T], timeout: float) -> T:
        """Run a function on the thread, and return or raise what it does.

        Raises :class:`LoopEnded`.
        """
        done = Flag()
        outcome: list[tuple[bool, Any]] = []

        def run() -> None:
            try:
                outcome.append((True, function()))
            except Exception as error:
                outcome.append((False, error))
            done.set()

        self.call(run)
        deadline = time.monotonic() + timeout
        while not done.wait(min(1.0, max(0.0, deadline - time.monotonic()))):
            if self.ended is not None or time.monotonic() >= deadline:
                raise LoopEnded(self.ended or "the thread of the engine is busy")
        good, value = outcome[0]
        if good:
            return value  # type: ignore[no-any-return]
        raise value

    # -- on the thread ---------------------------------------------------------------------------

    def watch(self, fd: int, function: Callable[[], None]) -> None:
        """Call a function when a descriptor is readable, until :meth:`unwatch`."""
        self._poller.register(fd, select.EPOLLIN)
        self._watched[fd] = function

    def unwatch(self, fd: int) -> None:
        """The descriptor is about to be closed."""
        self._watched.pop(fd, None)
        with contextlib.suppress(OSError):  # it is not registered
            self._poller.unregister(fd)

    def expect_tick(self, seconds: float) -> None:
        """Call the handler's tick after so many seconds at the latest."""
        at = time.monotonic() + seconds
        self._tick_at = at if self._tick_at is None else min(at, self._tick_at)

    @entry
    def _run(self) -> None:
        try:
            self._turns()
            self.ended = "the transport was closed"
        except BaseException as error:
            log.exception("unexpected error of a messaging transport; please report it")
            self.ended = f"its thread has ended: {type(error).__name__}: {error}"
        try:
            self._handler.fail(self.ended)
        finally:
            self._run_calls(len(self._calls))

    def _turns(self) -> None:
        fd = self._engine.fileno()
        self._poller.register(self._woken, select.EPOLLIN)
        if fd is not None:
            self._poller.register(fd, select.EPOLLIN)
        while not self._stopping:
            happened = False
            for event in self._engine.poll():
                self._guarded(partial(self._handler.event, event))
                happened = True
            # What was called may have begun to send: the engine must be polled before the thread sleeps.
            happened = self._run_calls(MAX_CALLS) or happened
            now = time.monotonic()
            happened = self._tick_if_due(now) or happened
            if happened:
                self._last_event = now
            self._wait(0.0 if happened else self._pause(now, fd))

    def _tick_if_due(self, now: float) -> bool:
        if self._tick_at is None or now < self._tick_at:
            return False
        self._tick_at = None
        self._guarded(self._handle_tick)
        return True

    def _handle_tick(self) -> None:
        seconds: float | None = RETRY_SECONDS
        try:
            seconds = self._handler.tick()
        finally:
            if seconds is not None:
                self.expect_tick(seconds)

    def _pause(self, now: float, fd: int | None) -> float:
        """Seconds to sleep at most; negative: until something happens."""
        until_tick = -1.0 if self._tick_at is None else max(0.0, self._tick_at - now)
        if fd is not None:
            return until_tick
        if now - self._last_event < SPIN_SECONDS:
            return 0.0
        return POLL_SECONDS if self._tick_at is not None else IDLE_POLL_SECONDS

    def _wait(self, seconds: float) -> None:
        self._sleeping = True  # before the look at the calls: see `call`
        ready = self._poller.poll(0.0 if self._calls else seconds)
        self._sleeping = False
        for fd, _ in ready:
            if fd == self._woken.fileno():
                with contextlib.suppress(BlockingIOError):
                    self._woken.recv(4096)
            elif fd in self._watched:
                self._guarded(self._watched[fd])

    def _guarded(self, function: Callable[[], None]) -> None:
        """What goes wrong in one call does not end the thread, which all links need."""
        try:
            function()
        except Exception:
            log.exception("unexpected error of a messaging transport; please report it")

    def _run_calls(self, most: int) -> bool:
        """Run what other threads have left, and tell whether there was something."""
        count = min(most, len(self._calls))
        for _ in range(count):
            self._guarded(self._calls.popleft())
        return count > 0

    # -- the end ---------------------------------------------------------------------------------

    def stop(self) -> bool:
        """End the thread, and wait for it; whether it has ended. Idempotent."""
        self._stopping = True
        self.call(lambda: None)
        self._thread.join(STOP_SECONDS)
        if self._thread.is_alive():
            return False
        self._poller.close()
        self._close_sockets()
        return True

    def _close_sockets(self) -> None:
        self._waking.close()
        self._woken.close()

"""The one thread per engine that waits for sockets, timers and posted calls.

All control-plane state is changed on this thread only, so it needs no locks. A turn runs what is ready,
the timers that are due and what was posted before it, each once: what any of these posts comes in the
next turn, after the others. Nothing here may block, or start a thread: what may block goes to
:attr:`Reactor.helpers`, and descriptors of peers go to :attr:`Reactor.closer`.
"""

from __future__ import annotations

import contextlib
import ctypes
import heapq
import itertools
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from datadist.base.calls import Outcome, entry
from datadist.base.flag import Flag
from datadist.base.process_access import REFUSALS
from datadist.base.texts import in_seconds
from datadist.base.threads import start
from datadist.base.workers import Workers
from datadist.control.closing import Closer

log = logging.getLogger("datadist.control")

T = TypeVar("T")

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
WAKE = ctypes.PyDLL(None).eventfd_write
"""Keeps the GIL, as it never blocks: who lets it go beside many busy threads gets it back late."""
WAKE.argtypes = ctypes.c_int, ctypes.c_uint64
WAKE_BYTES = 4096
"""Read at once: the count of an eventfd, or what lies in a pipe."""
MIN_TIMERS_TO_PRUNE = 64
"""Cancelled timers are removed only if there are at least this many timers."""
HELPERS = 2
"""Threads for look-ups that may take long: of names, and of engines elsewhere."""
HELPER_SECONDS = 1.0
"""How long the end of an engine waits for such a look-up."""
MAX_SLEEP_SECONDS = 3600.0
"""Seconds of one wait; epoll refuses more than 2^31 ms."""


def wake_descriptors() -> tuple[int, int]:
    """Where to wait for a wake-up and where to write it: one eventfd, or a pipe where that is refused.

    Raises ``OSError`` where no descriptor is left.
    """
    try:
        wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        return os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)  # WAKE writes eight bytes to either
    return wake, wake


class Unanswered(TimeoutError):
    """The control thread did not run a call in time, or has ended."""


class Timer:
    """A call to come; :meth:`cancel` from the reactor's thread."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[[], object]) -> None:
        self.call: Callable[[], object] | None = call

    def cancel(self) -> None:
        """Make it do nothing when its time comes."""
        self.call = None


@dataclass(eq=False)
class _Awaited:
    """What is looked at after every turn."""

    condition: Callable[[], bool]
    then: Callable[[], object]
    deadline: float
    turn: Timer
    """Brings a turn at the deadline."""


class Reactor:
    """Event loop on a daemon thread; started by the constructor, ended by :meth:`stop`.

    Raises ``RuntimeError`` where no thread can be started.
    """

    def __init__(self, name: str) -> None:
        with contextlib.ExitStack() as stack:
            self.closer = Closer(f"{name}-closer")
            stack.callback(self.closer.stop)
            self.helpers = Workers(HELPERS, f"{name}-helper")
            stack.callback(self.helpers.stop, 0.0)
            self._start(name, stack)
            stack.pop_all()

    def _start(self, name: str, stack: contextlib.ExitStack) -> None:
        self._wake = -1
        self._stopping = False
        self._ident = 0
        """Of the thread, while it runs: another one may have the same number afterwards."""
        self._epoll = select.epoll()
        self._watched: dict[int, tuple[int, Callable[[int], None]]] = {}
        """Which events of each descriptor are wanted, and what to call for them."""
        stack.callback(self.abandon)
        self._waking = threading.RLock()
        self._woken, self._wake = wake_descriptors()
        self.watch(self._woken, READ, self._drain_wake)
        self._posted: deque[Callable[[], object]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._prune_at = MIN_TIMERS_TO_PRUNE
        self._awaited: list[_Awaited] = []
        self._waited_for: set[Outcome[Any]] = set()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        start(self._thread)

    def is_current_thread(self) -> bool:
        """Whether the caller is on the reactor's thread."""
        return threading.get_ident() == self._ident

    def post(self, call: Callable[[], object]) -> None:
        """Run ``call`` soon on the reactor; from any thread."""
        self._posted.append(call)
        if (
            not self.is_current_thread() and self._wake >= 0
        ):  # a forked child must not touch the lock
            with self._waking:  # once stopped, the number may be another file's
                if self._wake >= 0:
                    WAKE(self._wake, 1)

    def call(self, function: Callable[[], T], timeout: float) -> T:
        """Run ``function`` on the reactor and return its result or raise its exception.

        Where the caller is interrupted, the function runs nevertheless. Raises :class:`Unanswered` when
        the reactor does not come to it within ``timeout`` seconds, and at once when it has been stopped.
        """
        if self.is_current_thread():
            return function()
        return self._await(Outcome(function), lambda run: run(), timeout)

    def call_when(
        self,
        condition: Callable[[], bool],
        seconds: float,
        function: Callable[[], T],
        timeout: float,
    ) -> T:
        """:meth:`call`, but ``function`` runs as :meth:`when` says; not from the reactor."""
        return self._await(
            Outcome(function), lambda run: self.when(condition, run, seconds), timeout
        )

    def _await(
        self,
        outcome: Outcome[T],
        begin: Callable[[Callable[[], object]], object],
        timeout: float,
    ) -> T:
        try:
            self._waited_for.add(outcome)
            self.post(lambda: begin(outcome.run))
            if self._wake < 0:
                self._give_up_calls()
            if outcome.done.wait(timeout):
                return outcome.result()
            outcome.claim()
        finally:
            self._waited_for.discard(outcome)
        raise Unanswered(
            f"the control thread of this engine did not answer within {in_seconds(timeout)}"
        )

    def _give_up_calls(self) -> None:
        """End all waiting calls with an error, since the thread has ended."""
        for outcome in list(self._waited_for):
            outcome.fail(Unanswered("the control thread of this engine has ended"))

    def later(self, delay: float, call: Callable[[], object]) -> Timer:
        """Run ``call`` in ``delay`` seconds; from the reactor's thread."""
        self._forget_cancelled()
        timer = Timer(call)
        heapq.heappush(self._timers, (time.monotonic() + delay, next(self._order), timer))
        return timer

    def _forget_cancelled(self) -> None:
        """Cancelled timers would otherwise stay until their time comes."""
        if len(self._timers) < self._prune_at:
            return
        self._timers = [item for item in self._timers if item[2].call is not None]
        heapq.heapify(self._timers)
        self._prune_at = max(MIN_TIMERS_TO_PRUNE, 2 * len(self._timers))

    def when(
        self, condition: Callable[[], bool], then: Callable[[], object], seconds: float
    ) -> None:
        """Run ``then`` after the turn that makes ``condition`` hold, or after ``seconds``.

        From the reactor. Whoever changes what the condition is about on another thread posts something.
        """
        deadline = time.monotonic() + seconds
        turn = self.later(seconds, lambda: None)  # not before the deadline
        self._awaited.append(_Awaited(condition, then, deadline, turn))

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait as :meth:`when` does, on another thread; whether the condition holds."""
        if not condition():
            event = Flag()
            self.post(lambda: self.when(condition, event.set, seconds))
            event.wait(seconds)
        return condition()

    def watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Call ``callback(events)`` when ``fd`` is ready; again to change the events."""
        if fd in self._watched:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._watched[fd] = events, callback

    def unwatch(self, fd: int) -> None:
        """Forget ``fd``; harmless when it is not watched. Call before closing it."""
        if self._watched.pop(fd, None) is not None:
            with contextlib.suppress(OSError, ValueError):  # it, or epoll, was closed before
                self._epoll.unregister(fd)

    def stop(self, timeout: float = 5.0) -> None:
        """End the thread and close what the reactor owns; from another thread."""
        self.helpers.tell()
        self.closer.tell()
        self._stopping = True
        self.post(lambda: None)
        self._thread.join(timeout)
        with self._waking:
            self.abandon()
        self._give_up_calls()
        self.helpers.stop(HELPER_SECONDS)
        self.closer.stop()

    def abandon(self) -> None:
        """Close the descriptors without waiting for the thread (as in a forked child)."""
        if not self._stopping:
            self._ident = 0  # the thread is not here
        self._epoll.close()
        self._watched = {}
        wake, self._wake = self._wake, -1
        if wake >= 0:
            for fd in {wake, self._woken}:
                os.close(fd)

    def _drain_wake(self, _events: int) -> None:
        os.read(self._woken, WAKE_BYTES)

    @entry
    def _run(self) -> None:
        self._ident = threading.get_ident()
        try:
            self._take_turns()
        finally:
            self._ident = 0

    def _take_turns(self) -> None:
        while not self._stopping:
            self._handle_events()
            self._run_timers()
            for _ in range(len(self._posted)):
                self._guard(self._posted.popleft())
            if self._awaited:
                self._look_at_awaited()

    def _look_at_awaited(self) -> None:
        for each in list(self._awaited):
            self._guard(lambda each=each: self._look_at(each))  # type: ignore[misc]

    def _look_at(self, awaited: _Awaited) -> None:
        if awaited.deadline <= time.monotonic() or awaited.condition():
            self._awaited.remove(awaited)
            awaited.turn.cancel()
            awaited.then()

    def _handle_events(self) -> None:
        """Handle events in a separate function, so that no local variable keeps an ended session
        alive.
        """
        ready = self._epoll.poll(self._timeout(), len(self._watched))
        known = self._watched
        calls = [(found, *known[fd]) for fd, found in ready if fd in known]
        for found, wanted, callback in calls:  # an error and a hang-up count as both
            events = (READ if found & ~WRITE else 0) | (WRITE if found & ~READ else 0)
            self._guard(partial(callback, events & wanted))

    def _timeout(self) -> float | None:
        if self._posted:
            return 0
        if not self._timers:
            return None
        return min(max(0.0, self._timers[0][0] - time.monotonic()), MAX_SLEEP_SECONDS)

    def _run_timers(self) -> None:
        now = time.monotonic()  # what a timer begins comes in the next turn
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            if timer.call is not None:
                self._guard(timer.call)

    @staticmethod
    def _guard(call: Callable[[], object]) -> None:
        try:
            call()
        except Exception:
            log.exception("unexpected error in the control plane; please report it")

"""Calls of users: which one a thread is inside of, and how some go on where one is interrupted.

Python runs handlers of signals and `__del__` between any two steps of a call, on its thread. What
they call in turn must neither wait for what that call holds nor find its state half changed: most
calls refuse that (:func:`begin`). What has to be done as a whole runs on another thread
(:class:`CallThread`, :func:`apart`), where no handler runs: only the waiting is interrupted.
"""

from __future__ import annotations

import _thread
import queue
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import CodeType, FrameType, FunctionType
from typing import Any, Generic, TypeVar

from datadist.base.callers import pass_on
from datadist.base.flag import Flag
from datadist.base.threads import START_SECONDS, check_room, start

__all__ = [
    "CallThread", "Ended", "Outcome", "apart", "begin", "entries", "entry", "inside_call", "run_apart",
]  # fmt: skip

T = TypeVar("T")
Kind = TypeVar("Kind", bound=type)
Function = TypeVar("Function", bound="Callable[..., Any]")

JOIN_SECONDS = 5.0
_ENTRIES: set[CodeType] = set()
"""The functions by which users, and threads of ours, get into the engine."""


def entry(function: Function) -> Function:
    """Decorate a function: its thread is inside a call until it returns."""
    _ENTRIES.add(function.__code__)
    return function


def entries(kind: Kind) -> Kind:
    """Decorate a class: so are all its public methods."""
    for name, member in vars(kind).items():
        if not name.startswith("_") and isinstance(member, FunctionType):
            entry(member)
    return kind


def inside_call(frame: FrameType | None) -> bool:
    """Whether ``frame``, or one that called it, is inside a call. Costs nothing elsewhere."""
    while frame is not None:
        if frame.f_code in _ENTRIES:
            return True
        frame = frame.f_back
    return False


def begin(name: str) -> None:
    """The caller, a public method, begins.

    Raises ``RuntimeError`` where its thread is inside a call already.
    """
    if inside_call(sys._getframe(2)):
        raise RuntimeError(
            f"{name} was called while this thread is inside another call of the engine (by a signal "
            "handler, or by __del__): only stats, finalize, deallocate_cache, deallocate_blocks_cache, "
            "remove_cache_key and unregister_cache can be called there; set a flag, and call it later"
        )


class Ended(Exception):
    """The thread that was to run the call has ended."""


class Outcome(Generic[T]):
    """A function that one thread runs, and others wait for."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function: Callable[[], T] | None = function
        self._first: list[object] = []
        """Who came first decides: appending needs no lock."""
        self._results: list[T] = []
        self._error: BaseException | None = None
        self.done = Flag()
        self.thread: threading.Thread | None = None

    def claim(self) -> bool:
        """Whether the caller decides what becomes of it: nobody runs it, or has given it up."""
        mine = object()
        self._first.append(mine)
        return self._first[0] is mine

    @entry
    def run(self, claimed: bool = False) -> None:
        """Run it, unless somebody else has claimed it."""
        if not (claimed or self.claim()):
            return
        assert self._function is not None
        try:
            self._results.append(self._function())
        except BaseException as error:
            self._error = error
        finally:
            self._function = None
            self.done.set()

    def fail(self, error: BaseException) -> None:
        """Nobody need wait for it, for this reason."""
        self.claim()
        if not self.done.is_set():
            self._error = error
            self.done.set()

    def result(self) -> T:
        """Wait for it; its result, or what it raised. To be called once."""
        self.done.wait()
        error = self._error
        if error is not None:
            try:
                raise error
            finally:
                self._error = error = None  # no circle with the frames of its traceback
        return self._results[0]

    def join(self) -> None:
        """Wait until its own thread, where it has one, has ended, which it is about to."""
        if self.thread is not None:
            self.thread.join(JOIN_SECONDS)


class CallThread:
    """Runs calls of users one after the other; no handler of a signal runs there."""

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[Outcome[Any] | None] = queue.SimpleQueue()
        self._interrupted = False
        """Whether a call may go on whose caller does not wait for it any more."""
        self._closing = False
        self.ended = Flag()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        start(self._thread)

    def submit(self, outcome: Outcome[Any]) -> None:
        """Have it run. Where the thread ends before, its result is :class:`Ended`."""
        self._queue.put(outcome)
        if self.ended.is_set():
            self._refuse()

    def call(self, function: Callable[[], T]) -> T:
        """The result of ``function``, which goes on where the caller is interrupted.

        Raises what it raises, and :class:`Ended`.
        """
        outcome = Outcome(function)
        try:
            self.submit(outcome)
            return outcome.result()
        except BaseException:
            self._interrupted = True
            raise

    def catch_up(self) -> None:
        """Where the last call goes on although its caller was interrupted, wait for its end."""
        if self._interrupted:
            self._interrupted = False
            with suppress(Ended):
                self.call(lambda: None)

    def close(self) -> None:
        """End the thread after what it runs now; does not wait."""
        self._closing = True
        self._queue.put(None)

    def join(self) -> None:
        """Wait until the thread has ended, which must not be the caller's."""
        self._thread.join(JOIN_SECONDS)

    def stop(self) -> None:
        """End the thread."""
        self.close()
        self.join()

    @entry
    def _run(self) -> None:
        while not self._closing:
            outcome = self._queue.get()
            if outcome is None:
                break
            outcome.run()
            del outcome  # which keeps what the function knows
        self.ended.set()
        self._refuse()

    def _refuse(self) -> None:
        with suppress(queue.Empty):
            while True:
                outcome = self._queue.get_nowait()
                if outcome is not None:
                    outcome.fail(Ended())


def apart(function: Callable[[], T], name: str) -> T:
    """The result of ``function``, which runs on a thread of its own and goes on where this is left."""
    outcome = Outcome(function)
    run_apart(outcome, name)
    return outcome.result()


def run_apart(outcome: Outcome[Any], name: str) -> None:
    """Run it on a thread of its own; here where none can be started."""
    begun = Flag()

    def start_it() -> None:
        begun.set()
        if not outcome.claim():
            return
        try:
            outcome.thread = threading.Thread(
                target=outcome.run, args=(True,), name=name, daemon=True
            )
            start(outcome.thread)  # waits, which only handlers of signals could tear
        except (RuntimeError, MemoryError):
            outcome.thread = None
            outcome.run(claimed=True)

    try:
        check_room()
        _thread.start_new_thread(start_it, ())
    except RuntimeError as error:
        pass_on(error)
        outcome.run()
        return
    if not begun.wait(START_SECONDS):  # there was no memory for its first step
        outcome.run()

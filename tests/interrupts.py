"""Run other code at every moment of a call, one moment per run: an exception, or a function.

CPython runs signal handlers where a Python function begins, after a function of C that was called
returns, and at jumps backwards; what they raise appears there. :func:`raising` does that at the first two
kinds, by the events of a profiler. :func:`raising_at_jumps` also does it at jumps (in Python 3.10 at all
of them), and after calls that a profiler does not see, such as those of types. `__del__` may run where
something is allocated, which is almost anywhere: :func:`meanwhile` takes every instruction.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dis import Bytecode, opname
from functools import cache, partial
from inspect import CO_GENERATOR
from types import CodeType, FrameType
from typing import Any, TypeVar

from datadist.base.log_locks import give_back_locks

T = TypeVar("T")
State = TypeVar("State")
Action = Callable[[], object]
_Run = Callable[["_Moment", Callable[[], Any]], Any]
"""Runs a call with a moment: a function of this module."""


class Interrupt(BaseException):
    """What the handler of a signal raises here."""


class Watchdog(Exception):
    """The same, by the handler of a task queue, say."""


class _Moment:
    """Counts moments, and does something at one of them."""

    def __init__(self, number: int, action: Action, outside: CodeType) -> None:
        self.left = number
        self.where = ""
        self._action = action
        self._outside = outside
        self._last: dict[FrameType, int] = {}
        """The instruction that each frame has executed last."""

    @property
    def reached(self) -> bool:
        return bool(self.where)

    def profile(self, frame: FrameType, event: str, arg: Any) -> None:
        inside = frame.f_code is not self._outside and not _is_out_of_reach(frame)
        if inside and event in ("call", "c_return") and arg is not sys.setprofile:
            self._pass(frame)

    def trace(self, frame: FrameType, event: str, _arg: Any) -> Any:
        if frame.f_code is self._outside:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self._pass(frame)
        return self.trace

    def trace_jumps(self, frame: FrameType, event: str, _arg: Any) -> Any:
        """Moments are instructions after a call or a jump."""
        code = frame.f_code
        if code is self._outside or code.co_flags & CO_GENERATOR:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            before, now = self._last.get(frame), frame.f_lasti
            self._last[frame] = now
            if before is not None and _is_checked(code, before, now):
                self._pass(frame)
        return self.trace_jumps

    def _pass(self, frame: FrameType) -> None:
        self.left -= 1
        if self.left == 0:
            self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            self._action()


def _is_checked(code: CodeType, before: int, now: int) -> bool:
    """Whether CPython looks for signals between two instructions, by their offsets.

    What a handler raises belongs to the first one, and what a tracer raises to the second one: both must
    lie in the same `try`.
    """
    name = opname[code.co_code[before]]
    if "JUMP" in name:
        looks = now < before if sys.version_info >= (3, 11) else now != before + 2
    else:
        looks = "CALL" in name and name != "PRECALL"
    if opname[code.co_code[now]].startswith("SETUP"):  # the beginning of a `try` in Python 3.10
        return False
    handlers = _handlers(code)
    return looks and handlers.get(before) == handlers.get(now)


@cache
def _handlers(code: CodeType) -> dict[int, int]:
    """Where exceptions are handled, by offset; before Python 3.11 that is not in the code."""
    entries = getattr(Bytecode(code), "exception_entries", ())
    return {at: each.target for each in entries for at in range(each.start, each.end, 2)}


def _is_out_of_reach(frame: FrameType) -> bool:
    """Whether an exception could not come out, or would come where CPython lets none come.

    A profiler's leaves a generator that goes on without its `finally`. What is raised in the callback of
    a weak reference is only reported. What a transport of the tests registers before it returns is its
    own to lose.
    """
    code = frame.f_code
    return bool(code.co_flags & CO_GENERATOR) or code.co_filename.endswith(
        ("_weakrefset.py", "tests/caches/world.py")
    )


@contextmanager
def _collecting_nothing() -> Iterator[None]:
    """What is raised in `__del__`, or in a callback of the collector (as of Hypothesis), gets nowhere."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def _tracing(moment: _Moment) -> Iterator[None]:
    before = sys.gettrace()
    with _collecting_nothing():
        sys.settrace(moment.trace)
        try:
            yield
        finally:
            sys.settrace(before)


def _traced(moment: _Moment, call: Callable[[], T]) -> T:
    before = sys.gettrace()
    with _collecting_nothing():
        sys.settrace(moment.trace_jumps)
        try:
            return call()
        finally:
            sys.settrace(before)


def _profiled(moment: _Moment, call: Callable[[], T]) -> T:
    before = sys.getprofile()
    with _collecting_nothing():
        sys.setprofile(moment.profile)
        try:
            return call()
        finally:
            sys.setprofile(before)


def raise_at(number: int, call: Callable[[], object], kind: type[BaseException]) -> str:
    """Run a call with an exception at the moment of that number; where that was, empty for nowhere.

    Raises what the call makes of that exception, unless it passes it on; that is an error.
    """
    return _raised_at(number, call, kind)[0]


def _raised_at(
    number: int, call: Callable[[], object], kind: type[BaseException], run: _Run = _profiled
) -> tuple[str, BaseException | None]:
    """:func:`raise_at`, and the exception, which keeps all frames that it has passed."""

    def strike() -> None:
        raise kind

    moment, caught = _Moment(number, strike, run.__code__), None
    try:
        run(moment, call)
    except kind as error:
        assert moment.reached
        caught = error
    else:
        assert not moment.reached, f"the exception at {moment.where} was swallowed"
    return moment.where, caught


def raising(
    call: Callable[[], object], kind: type[BaseException] = Interrupt, step: int = 1
) -> Iterator[str]:
    """Run a call again and again, with an exception at every ``step``-th moment in turn.

    Yields where the exception came, after each run: what was left has to be looked at there, while the
    exception is kept, as a debugger and a task queue do. The last run goes to its end, and nothing is
    yielded for it.
    """
    for where, _ in raising_anew(lambda: None, lambda _: call(), kind, step):
        yield where


def spared(call: Callable[[], object]) -> None:
    """Run what another thread or process does, inside of a call that is interrupted: it is not."""
    before = sys.getprofile()
    sys.setprofile(None)
    try:
        call()
    finally:
        sys.setprofile(before)


def meanwhile(call: Callable[[], object], action: Action, step: int = 1) -> Iterator[str]:
    """Run a call again and again, and ``action`` inside of it, at every ``step``-th instruction in turn.

    Yields where it came, after each run. The last run is without it, and nothing is yielded for it.
    """
    number = 1
    while True:
        moment = _Moment(number, action, meanwhile.__code__)
        with _tracing(moment):
            call()
        if not moment.reached:
            return
        yield moment.where
        number += step


def raising_anew(
    prepare: Callable[[], State],
    call: Callable[[State], object],
    kind: type[BaseException] = Interrupt,
    step: int = 1,
    run: _Run = _profiled,
) -> Iterator[tuple[str, State]]:
    """:func:`raising`, each time with a state of its own, which is yielded too."""
    for name in list(logging.root.manager.loggerDict):  # as engines do, which may not run here
        if name.startswith("datadist"):
            give_back_locks(logging.getLogger(name))
    number = 1
    while True:
        state = prepare()
        where, kept = _raised_at(number, partial(call, state), kind, run)
        if not where:
            return
        yield where, state
        del kept
        number += step


def raising_at_jumps(
    prepare: Callable[[], State], call: Callable[[State], object]
) -> Iterator[tuple[str, State]]:
    """:func:`raising_anew`, at more moments; not inside of generators."""
    return raising_anew(prepare, call, run=_traced)


def meanwhile_anew(
    prepare: Callable[[], State],
    call: Callable[[State], object],
    action: Callable[[State], object],
    step: int = 1,
) -> Iterator[tuple[str, State]]:
    """:func:`meanwhile`, each time with a state of its own, which is yielded too."""
    number = 1
    while True:
        state = prepare()
        moment = _Moment(number, partial(action, state), meanwhile_anew.__code__)
        with _tracing(moment):
            call(state)
        if not moment.reached:
            return
        yield moment.where, state
        number += step

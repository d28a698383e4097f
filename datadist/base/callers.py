"""Exceptions of the caller's: what a handler of a signal raises while a call of ours is under way.

It passes through every call unchanged. Where we catch exceptions, for what a transport, a parser or
NumPy may raise, such a one can be among them: a watchdog may raise any type, at any moment.

So may one that another thread throws into the caller's (`PyThreadState_SetAsyncExc`), as task queues
do. No handler's frame tells of that. Recognised is a class that is written in Python and not of its
library, without arguments, which appears where no `raise` stands: native code has classes of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from opcode import opmap
from types import FrameType, TracebackType

__all__ = ["callers_own", "pass_on", "tolerate"]

_RAISE = {opmap[name] for name in ("RAISE_VARARGS", "RERAISE")}
"""What the `raise` statement is compiled to."""


def pass_on(error: BaseException) -> None:
    """Raise what a handler of a signal has raised, if ``error`` is that or was made of that."""
    found = callers_own(error)
    if found is not None:
        try:
            raise found
        finally:
            del found, error  # no circle with the frames of its traceback


class tolerate:  # noqa: N801 - used as `contextlib.suppress` is
    """Suppress exceptions of these types, but pass the caller's on."""

    def __init__(self, *types: type[BaseException]) -> None:
        self._types = types

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> bool:
        if not isinstance(error, self._types):
            return False
        pass_on(error)
        return True


def callers_own(error: BaseException) -> BaseException | None:
    """The exception of a handler that ``error`` is, or that was handled when it was raised.

    Not what the caller itself handled before it called us: that was caught outside of ``error``'s
    frames.
    """
    frames: set[FrameType] = set()
    found: BaseException | None = error
    while found is not None:
        entered = list(_frames(found.__traceback__))
        if frames and (not entered or entered[0] not in frames):
            return None
        if any(_is_handler(frame, caller) for caller, frame in pairwise(entered)):
            return found
        if _is_thrown(found):
            return found
        frames.update(entered)
        found = found.__cause__ or found.__context__
    return None


def _frames(trace: TracebackType | None) -> Iterator[FrameType]:
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _is_thrown(error: BaseException) -> bool:
    """Whether another thread has thrown it: made of its class, by the interpreter itself."""
    trace = error.__traceback__
    if trace is None or error.args or not _is_of_a_program(type(error).__module__):
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_code[trace.tb_lasti] not in _RAISE


def _is_of_a_program(name: str) -> bool:
    """Whether a module is written in Python, and not of its library."""
    if name.partition(".")[0] in sys.stdlib_module_names and name != "__main__":
        return False
    source = getattr(sys.modules.get(name), "__file__", None)
    return name == "__main__" or (source is not None and source.endswith(".py"))


def _is_handler(frame: FrameType, interrupted: FrameType) -> bool:
    """Handlers, and functions of tracers, are called with the frame that they interrupt."""
    code = frame.f_code
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + 1]
    values = [frame.f_locals.get(name) for name in names]
    each = [one for value in values for one in (value if type(value) is tuple else (value,))]
    return any(one is interrupted for one in each)

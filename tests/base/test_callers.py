"""Exceptions of handlers are told from those of parsers and transports (callers.py)."""

from __future__ import annotations

import ctypes
import json
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from datadist.base.callers import callers_own, pass_on, tolerate
from datadist.control.messages import Ack


class SoftLimit(Exception):
    """As a task queue raises it."""


def _inject_fault(*_args: Any) -> None:
    raise SoftLimit


def _strike_with(_extra: object, number: int, frame: object) -> None:
    raise SoftLimit(number, frame is not None)


class _Watchdog:
    def strike(self, _number: int, _frame: object) -> None:
        self._deeper()

    def _deeper(self) -> None:
        raise SoftLimit

    def __call__(self, number: int, frame: object) -> None:
        raise SoftLimit


HANDLERS: list[Callable[..., Any]] = [
    _inject_fault, partial(_strike_with, 1), _Watchdog().strike, _Watchdog(),
    lambda number, frame: _inject_fault(),
]  # fmt: skip


def _raised_in(call: Callable[[], object]) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call()
    return caught.value


@pytest.fixture(params=HANDLERS)
def interrupt(request: pytest.FixtureRequest) -> Any:
    """A function that sends a signal whose handler raises."""
    before = signal.signal(signal.SIGUSR1, request.param)
    yield lambda: signal.raise_signal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


def test_what_a_handler_raised_is_the_callers(interrupt: Callable[[], None]) -> None:
    error = _raised_in(interrupt)
    assert callers_own(error) is error
    with pytest.raises(SoftLimit) as caught:
        pass_on(error)
    assert caught.value is error


@pytest.mark.parametrize("chain", ["from", "context", "from None"])
def test_so_is_what_a_plugin_made_another_exception_of(
    interrupt: Callable[[], None], chain: str
) -> None:
    def wrap() -> None:
        try:
            interrupt()
        except Exception as error:
            if chain == "from":
                raise ValueError("wrapped") from error
            if chain == "context":
                raise ValueError("wrapped")  # noqa: B904
            raise ValueError("wrapped") from None

    error = _raised_in(wrap)
    assert isinstance(error, ValueError)
    assert isinstance(callers_own(error), SoftLimit)


def test_what_the_caller_handled_before_is_not(interrupt: Callable[[], None]) -> None:
    def fail() -> None:
        raise ValueError("no way")

    try:
        interrupt()
    except SoftLimit:
        error = _raised_in(fail)
    assert error.__context__ is not None
    assert callers_own(error) is None


@pytest.mark.parametrize(
    "call",
    [
        lambda: json.loads("{"),
        lambda: int("x"),
        lambda: _Watchdog()._deeper(),
        lambda: {"y": 1}["x"],
        lambda: Ack.model_validate_json("{"),  # a class of native code, without arguments
    ],
)
def test_other_exceptions_are_not(call: Callable[[], object]) -> None:
    error = _raised_in(call)
    assert callers_own(error) is None
    pass_on(error)


def test_arguments_are_not_compared() -> None:
    """Those of an array have no truth value."""

    def with_array(*_arrays: object) -> None:
        raise ValueError("of ours")

    error = _raised_in(lambda: with_array(np.arange(3), np.arange(2)))
    assert callers_own(error) is None


def _throw(kind: type[BaseException] = SoftLimit) -> None:
    """Into this thread, as another one may: it comes once the call has returned."""
    ident = ctypes.c_ulong(threading.get_ident())
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(kind))
    sum(number for number in range(10))


def _loop() -> None:
    ident, kind = ctypes.c_ulong(threading.get_ident()), ctypes.py_object(SoftLimit)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, kind)
    while True:
        pass


@pytest.mark.parametrize("call", [_throw, _loop])
def test_what_another_thread_throws_is_the_callers(call: Callable[[], None]) -> None:
    error = _raised_in(call)
    assert callers_own(error) is error
    with pytest.raises(ValueError, match="wrapped") as caught:
        _wrap(call)
    assert isinstance(callers_own(caught.value), SoftLimit)


def _wrap(call: Callable[[], None]) -> None:
    try:
        call()
    except Exception as error:
        raise ValueError("wrapped") from error


def test_what_is_thrown_cannot_be_told_from_what_python_raises_itself() -> None:
    assert callers_own(_raised_in(lambda: _throw(TimeoutError))) is None


def test_tolerating_passes_on_what_is_the_callers(interrupt: Callable[[], None]) -> None:
    with tolerate(ValueError, LookupError):
        raise KeyError(1)
    with pytest.raises(OSError, match="other"), tolerate(ValueError):
        raise OSError("other")
    with pytest.raises(SoftLimit), tolerate(Exception):
        interrupt()

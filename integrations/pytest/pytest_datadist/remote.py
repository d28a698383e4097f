"""What runs in the process of a worker: an engine for each test, and the functions of the test.

Functions, arguments and results travel through a pipe between the test and the process that it
started; nobody else can reach that pipe.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any

from pytest_datadist import cutting
from pytest_datadist.held import Held, links_of, pools_of
from pytest_datadist.processes import descendants
from pytest_datadist.references import Reference, resolve

if TYPE_CHECKING:
    from datadist.testing.child import State

KEY = "pytest-datadist"
PRELOADED = ("datadist.api.cache_manager", "datadist.engine.engine")
"""What every engine needs."""


@dataclass(frozen=True)
class Setup:
    """What a worker is for a test."""

    role: str | None
    """None where the test's own code makes the engine."""
    cluster_id: int
    options: Mapping[str, str]
    environ: Mapping[str, str]
    directory: str
    path: Sequence[str]


@dataclass
class _Test:
    """What this process has for a test."""

    before: Held
    engine: Any = None
    comm_id: int | None = None
    kept: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Handle:
    """Stands for an object that stays in this process."""

    number: int


@dataclass(frozen=True)
class Raised:
    """An exception: pickled, where it can be, and its traceback."""

    pickled: bytes | None
    text: str
    line: str
    """The exception alone, in one line."""


def answering(function: Callable[..., Any]) -> Callable[..., bytes | Raised]:
    """Have a function return its result pickled, and its exception as :class:`Raised`."""

    @wraps(function)
    def answer(*args: Any) -> bytes | Raised:
        try:
            return pickle.dumps(function(*args))
        except BaseException as error:
            return raised(error)

    return answer


@answering
def warm(_state: State) -> None:
    """Import what every engine needs, and ignore Ctrl-C, which is for the test's process."""
    signal.signal(signal.SIGINT, lambda *_: None)
    for name in PRELOADED:
        importlib.import_module(name)


@answering
def begin(state: State, setup: Setup) -> None:
    """Take the test's environment, and initialise an engine."""
    (orders,) = state.take_fds()
    listener = threading.Thread(
        target=cutting.serve, args=(socket.socket(fileno=orders),), name=KEY, daemon=True
    )
    listener.start()
    os.environ.clear()
    os.environ.update(setup.environ)
    os.chdir(setup.directory)
    sys.path[:] = setup.path
    state.any[KEY] = test = _Test(Held.now())
    if setup.role is not None:
        from datadist import LLMDataDist, LLMRole

        engine = LLMDataDist(LLMRole[setup.role], setup.cluster_id)
        engine.init(dict(setup.options))
        test.engine = engine


@answering
def link(state: State, name: str, mapping: dict[int, int], table: str) -> int:
    """Link the engine with those of the other workers, and wait until that is done."""
    test = _test(state)
    comm_id: int = test.engine.link(name, mapping, table)
    test.engine.wait_link(comm_id)
    test.comm_id = comm_id
    return comm_id


@answering
def call(state: State, reference: Reference, payload: bytes, keep: int | None) -> Any:
    """Run a function of the test; its result is returned, or kept under a number."""
    test = _test(state)
    function = resolve(reference)
    args, options = pickle.loads(payload)
    first = [] if test.engine is None else [test.engine]
    args = [_held(test, each) for each in args]
    options = {name: _held(test, each) for name, each in options.items()}
    value = function(*first, *args, **options)
    if keep is None:
        return _checked(value, reference)
    test.kept[keep] = value
    return None


def _test(state: State) -> _Test:
    test: _Test = state.any[KEY]
    return test


def _held(test: _Test, value: Any) -> Any:
    return test.kept[value.number] if isinstance(value, Handle) else value


def _checked(value: Any, reference: Reference) -> Any:
    """A result that can be pickled. Raises ``TypeError`` that says what to do."""
    try:
        pickle.dumps(value)
    except Exception as error:
        raise TypeError(
            f"what {reference.name} returned cannot leave its process ({error}): return plain values, or "
            "call it with keep(), which leaves the object there"
        ) from None
    return value


def raised(error: BaseException) -> Raised:
    """An exception as it travels; its traceback begins with the test's function."""
    begin = error.__traceback__
    while begin is not None and begin.tb_frame.f_code.co_filename == __file__:
        begin = begin.tb_next
    text = "".join(traceback.format_exception(type(error), error, begin))
    line = traceback.format_exception_only(error)[-1].strip()
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:
        return Raised(None, text, line)
    return Raised(data, text, line)


@answering
def finish(state: State, check_pools: bool) -> list[str]:
    """End the engine; what the test has left in this process, in words."""
    test: _Test = state.any.pop(KEY)
    engine = test.engine
    texts: list[str] = []
    if engine is not None and engine.backend is not None:
        texts += links_of(engine, test.comm_id)
        texts += pools_of(engine) if check_pools else []
    test.kept.clear()
    if engine is not None:
        engine.finalize()
    texts += test.before.left_since()
    return texts + [f"{each}, which still runs" for each in descendants(os.getpid())]

"""A process of the kit: holds one transport with its regions and links, and runs functions on them."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from datadist.base.texts import in_seconds
from datadist.testing import wire
from datadist.testing.connections import Connections
from datadist.testing.namespace import enter
from datadist.transport import InFlight, Link, Region, Transport

PR_SET_PDEATHSIG = 1


class Task:
    """A call on a thread of its own."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error

    def result(self, timeout: float) -> Any:
        """What the call returned or raised. Raises ``TimeoutError``."""
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"a call on another thread did not end in {in_seconds(timeout)}")
        if self._error is not None:
            raise self._error
        return self._value


@dataclass
class State:
    """The state of a process between the functions that it runs."""

    fds: list[int] = field(default_factory=list)
    """Descriptors that came with the call."""
    transport: Transport | None = None
    regions: dict[str, Region] = field(default_factory=dict)
    buffers: dict[str, object] = field(default_factory=dict)
    links: dict[str, Link] = field(default_factory=dict)
    added: dict[str, set[str]] = field(default_factory=dict)
    """Labels of the regions that each link heard of after it was opened."""
    peers: Connections = field(default_factory=Connections)
    in_flight: list[tuple[str, int, InFlight]] = field(default_factory=list)
    """Link, rank and what is left of transfers that have failed."""
    tasks: dict[str, Task] = field(default_factory=dict)
    engine: Any = None
    any: dict[str, Any] = field(default_factory=dict)

    @property
    def live(self) -> Transport:
        """The transport, which is open."""
        assert self.transport is not None, "the kit has not opened the transport in this process"
        return self.transport

    def take_fds(self) -> list[int]:
        """The descriptors that came with the call; the caller now owns them."""
        fds, self.fds = self.fds, []
        return fds


@dataclass(frozen=True)
class WithFds:
    """A result that comes with descriptors, which are closed once sent."""

    value: Any
    fds: list[int]


def serve(pipe_fd: int, stacks_fd: int, namespace: str) -> None:
    """Run functions for the test until it closes the pipe; in a network namespace, if one is named."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if namespace:
        enter(namespace)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, file=stacks_fd, all_threads=True)
    pipe, state = Connection(pipe_fd), State()
    while True:
        try:
            (function, args), state.fds = wire.receive(pipe)
        except (EOFError, OSError):
            os._exit(0)  # threads of a broken transport must not keep the process alive
        good, value = _call(function, state, args)
        fds = value.fds if isinstance(value, WithFds) else []
        wire.send(pipe, (good, value.value if isinstance(value, WithFds) else value), fds)
        for fd in [*fds, *state.take_fds()]:
            os.close(fd)


def _call(function: Callable[..., Any], state: State, args: tuple[Any, ...]) -> tuple[bool, Any]:
    try:
        return True, function(state, *args)
    except BaseException as error:
        kinds = [base.__name__ for base in type(error).__mro__]
        return False, (kinds, "".join(traceback.format_exception(error)))

"""A worker: a process with an engine, which runs functions of the test and can be made to fail."""

from __future__ import annotations

import pickle
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pytest_datadist import remote
from pytest_datadist.errors import RemoteTraceback, WorkerEnded, WorkerError, WorkerTimeout
from pytest_datadist.references import reference_to

if TYPE_CHECKING:
    from datadist.testing.processes import Process
    from pytest_datadist.isolation import Isolation

CUT_SECONDS = 10.0
_OUTCOMES = "_pytest.outcomes"
"""Module of the exceptions of ``pytest.skip`` and the like, which are no ``Exception``."""


class Kept:
    """An object that stays in a worker; give it to functions that run there."""

    def __init__(self, worker: Worker, number: int, maker: str) -> None:
        self._worker = worker
        self._number = number
        self._maker = maker

    def handle_in(self, worker: Worker) -> remote.Handle:
        """What stands for it on the way. Raises ``TypeError`` for another worker than its own."""
        if worker is not self._worker:
            raise TypeError(f"{self!r} is no object of {worker!r}")
        return remote.Handle(self._number)

    def __repr__(self) -> str:
        return f"Kept({self._maker} in {self._worker!r})"


class Call:
    """A function that runs in a worker."""

    def __init__(self, worker: Worker, name: str) -> None:
        self._worker = worker
        self._name = name

    @property
    def done(self) -> bool:
        """Whether :meth:`result` would not wait."""
        return self._worker._process.answered

    def result(self, timeout: float | None = None) -> Any:
        """What the function returned; raises what it raised, with the traceback from there as cause.

        Raises :class:`WorkerTimeout` after ``timeout`` seconds (None: the option ``datadist_timeout``);
        the worker is killed then. Raises :class:`WorkerEnded` where the process ends meanwhile.
        """
        __tracebackhide__ = True
        return self._worker.answer(timeout)

    def __repr__(self) -> str:
        return f"Call({self._name} in {self._worker!r})"


class Worker:
    """One member of a cluster; see :class:`~pytest_datadist.cluster.Cluster`.

    Functions are those at the top level of a module, such as the test's. They are called with the
    worker's engine as first argument, one at a time, on the main thread of the process.
    """

    def __init__(
        self,
        process: Process,
        cluster_id: int,
        role: str | None,
        isolation: Isolation,
        seconds: float,
    ) -> None:
        self._process = process
        self._isolation = isolation
        self._seconds = seconds
        self._numbers = 0
        self._running = ""
        self._orders, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.cluster_id = cluster_id
        self.role = role
        self.comm_id: int | None = None
        """Of the link that the fixture has made; None where it made none."""
        self.faulted = False
        """Whether it cannot be used again: a fault was injected, or the test has seen it fail."""
        self.stopped = False
        process.name = repr(self)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def busy(self) -> str:
        """The function that runs, or whose result nobody has taken; empty for none."""
        return self._running

    # -- functions -------------------------------------------------------------------------------

    def start(self, function: Callable[..., Any], *args: Any, **options: Any) -> Call:
        """Start ``function(engine, *args, **options)`` there and return at once.

        Raises ``TypeError`` for a function that is not at the top level of a module, and for arguments
        that cannot be pickled, :class:`WorkerError` while another one runs there or while it is stopped.
        """
        return self._start(function, args, options, None)

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        timeout: float | None = None,
        **options: Any,
    ) -> Any:
        """Run a function and return its result; see :meth:`start` and :meth:`Call.result`."""
        __tracebackhide__ = True
        return self._start(function, args, options, None).result(timeout)

    def keep(
        self,
        function: Callable[..., Any],
        *args: Any,
        timeout: float | None = None,
        **options: Any,
    ) -> Kept:
        """As :meth:`run`, but the result stays in the process until the test ends."""
        __tracebackhide__ = True
        self._numbers += 1
        number = self._numbers
        self._start(function, args, options, number).result(timeout)
        return Kept(self, number, function.__name__)

    def _start(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        options: dict[str, Any],
        keep: int | None,
    ) -> Call:
        __tracebackhide__ = True
        reference = reference_to(function)
        given = [self._given(each) for each in args]
        named = {name: self._given(each) for name, each in options.items()}
        try:
            payload = pickle.dumps((given, named))
        except Exception as error:
            raise TypeError(
                f"the arguments of {reference.name} cannot be sent to a worker ({error}): give plain "
                "values, functions at the top level of a module, and what keep() returned"
            ) from None
        self.ask(reference.name, remote.call, reference, payload, keep)
        return Call(self, reference.name)

    def _given(self, value: Any) -> Any:
        return value.handle_in(self) if isinstance(value, Kept) else value

    # -- the process -----------------------------------------------------------------------------

    def begin(self, setup: remote.Setup) -> None:
        """Have the process prepare for the test; :meth:`answer` waits for that."""
        with self._theirs:
            self.ask("begin", remote.begin, setup, fds=[self._theirs.fileno()])

    def ask(
        self, name: str, function: Callable[..., Any], *args: Any, fds: list[int] | None = None
    ) -> None:
        """Start a function of :mod:`pytest_datadist.remote`; ``name`` is for people."""
        __tracebackhide__ = True
        from datadist.testing.processes import PeerEnded

        if self._running:
            raise WorkerError(
                f"{self!r} is busy with {self._running}: take its result before it runs {name}"
            )
        if self._process.ended:
            raise WorkerEnded(f"{self!r} was killed, or has ended, before it could run {name}")
        if self.stopped:
            raise WorkerError(f"{self!r} is stopped: call cont() before it runs {name}")
        try:
            self._process.begin(function, *args, fds=fds or [], label=name)
        except PeerEnded as error:
            self.faulted = True
            raise WorkerEnded(str(error)) from None
        self._running = name

    def answer(self, timeout: float | None = None) -> Any:
        """The result of what :meth:`ask` has started; see :meth:`Call.result`."""
        __tracebackhide__ = True
        from datadist.testing.processes import PeerEnded, PeerLate

        if not self._running:
            raise WorkerError(f"{self!r} runs nothing: its result was taken already")
        try:
            found = self._process.result(self._seconds if timeout is None else timeout)
        except BaseException as error:  # an interrupt of the test, too: the function goes on there
            self.faulted = True
            if not isinstance(error, (PeerLate, PeerEnded)):
                raise
            self._running = ""
            kind = WorkerTimeout if isinstance(error, PeerLate) else WorkerEnded
            raise kind(str(error)) from None
        self._running = ""
        if isinstance(found, remote.Raised):
            raise _error_of(found) from RemoteTraceback(repr(self), found.text)
        return pickle.loads(found)

    def ended_by_itself(self) -> str | None:
        """How the process ended, where nobody has ended it; else None."""
        if self.faulted or not self._process.crashed():
            return None
        return str(self._process.crash())

    def ended_in_call(self) -> str | None:
        """How the process ended in a call whose result nobody took; None where it did not."""
        name = self._running
        if not self._process.answered:
            return None
        try:
            self.answer(0.0)
        except WorkerEnded as error:
            return str(error)
        except BaseException:
            pass
        self._running = name
        return None

    def release(self) -> Process:
        """The process; what else belongs to the worker is closed."""
        self._orders.close()
        self._theirs.close()
        return self._process

    # -- faults ----------------------------------------------------------------------------------

    def kill(self) -> None:
        """SIGKILL, and wait for the end of the process."""
        self.faulted, self.stopped = True, False
        self._isolation.expect_end(self.pid, self.cluster_id)
        self._process.kill()

    def stop(self) -> None:
        """SIGSTOP, and wait until every thread has stopped."""
        self.faulted = self.stopped = True
        self._process.pause()

    def cont(self) -> None:
        """SIGCONT."""
        self._process.resume()
        self.stopped = False

    def cut(self, other: Worker) -> int:
        """Shut down this process's sockets that lead to another worker's; how many there were."""
        self.faulted = other.faulted = True
        try:
            self._orders.settimeout(CUT_SECONDS)
            self._orders.send(str(other.pid).encode())
            answer = self._orders.recv(64)
        except OSError as error:
            raise WorkerError(f"{self!r} did not cut its connections: {error}") from None
        if not answer:
            raise WorkerEnded(f"{self!r} has ended, so that nothing is left to be cut")
        return int(answer)

    def __repr__(self) -> str:
        role = f"{self.role}, " if self.role else ""
        return f"Worker({role}cluster {self.cluster_id}, pid {self._process.pid})"


def _error_of(found: remote.Raised) -> BaseException:
    """The exception to raise here: its own where it can be loaded and would not end pytest."""
    with suppress(Exception):
        error = pickle.loads(found.pickled or b"")
        if isinstance(error, Exception) or type(error).__module__ == _OUTCOMES:
            assert isinstance(error, BaseException)
            return error
    return WorkerError(found.line)

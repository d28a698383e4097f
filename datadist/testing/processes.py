"""The test's handle of a process of the kit: it runs functions one by one, each with a deadline."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from datadist.base.picklable import PicklableError
from datadist.base.shielded import start_shielded
from datadist.base.texts import in_seconds
from datadist.testing import wire

SECONDS = 60.0
STACKS_SECONDS = 2.0
STDERR_SECONDS = 2.0
"""How long to wait for the end of stderr, which a child of the process may hold open."""
LAST_LINES = 30
RELAY = "datadist-testing-stderr"
"""Name of the threads that pass on what processes write to stderr."""
BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from datadist.testing.child import serve; serve(int(sys.argv[1]), int(sys.argv[3]), sys.argv[4])"
)


class PeerError(PicklableError):
    """A function failed in a process; the text has the traceback from there."""

    def __init__(self, text: str, kinds: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.kinds = tuple(kinds)
        """Names of the exception's class and of its bases."""


class PeerLate(PeerError):
    """A function did not end by its deadline; the process was killed."""


class PeerEnded(PeerError):
    """The process ended by itself; the text has its last lines of stderr."""


def running_test() -> str:
    """The name of the test that pytest runs, with its parameters."""
    name = os.environ.get("PYTEST_CURRENT_TEST", "none").rpartition("::")[2]
    return name.partition(" (")[0]


class _Stderr:
    """Passes on what a process writes to stderr, and keeps the last lines of it."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        assert popen.stderr is not None, "the process has no pipe at stderr"
        self._lines: deque[bytes] = deque(maxlen=LAST_LINES)
        self._pipe = popen.stderr
        self._thread = threading.Thread(target=self._relay, name=RELAY, daemon=True)
        self._thread.start()

    def _relay(self) -> None:
        with self._pipe:
            for line in self._pipe:
                self._lines.append(line)
                with contextlib.suppress(OSError, ValueError):  # ours is closed
                    sys.stderr.write(line.decode(errors="replace"))

    def forget(self) -> None:
        """Keep nothing of what it has written so far."""
        self._lines.clear()

    def last_lines(self) -> str:
        """The end of what it wrote; the process has ended."""
        self._thread.join(STDERR_SECONDS)
        return b"".join(list(self._lines)).decode(errors="replace").rstrip()


class Process:
    """A new Python process; ``scale`` multiplies every deadline."""

    _popen: subprocess.Popen[bytes]

    def __init__(
        self, name: str, environ: Mapping[str, str], scale: float, namespace: str | None = None
    ) -> None:
        self.name = name
        self._scale = scale
        self._stacks_file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as we
        ours, theirs = socket.socketpair()
        fds = [theirs.fileno(), self._stacks_file.fileno()]
        command = [
            sys.executable, "-c", BOOT, str(fds[0]), json.dumps(sys.path), str(fds[1]), namespace or "",
        ]  # fmt: skip

        def start() -> None:
            self._popen = subprocess.Popen(
                command,
                pass_fds=fds,
                env={**os.environ, **environ},
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )

        with theirs:
            start_shielded(start)
        self._stderr = _Stderr(self._popen)
        self._pipe = Connection(ours.detach())
        self._running: str | None = None
        self.ended = False
        """Whether the test ended it, so that another one must be started."""

    @property
    def pid(self) -> int:
        """Process id."""
        return self._popen.pid

    def forget_stderr(self) -> None:
        """Tell nothing of what it has written to stderr so far; for a process that is used again."""
        self._stderr.forget()

    @property
    def busy(self) -> bool:
        """Whether a function runs there whose result nobody has taken."""
        return self._running is not None

    @property
    def answered(self) -> bool:
        """Whether :meth:`result` would not wait."""
        return self._pipe.poll(0)

    def begin(
        self, function: Callable[..., Any], *args: Any, fds: Sequence[int] = (), label: str = ""
    ) -> None:
        """Start ``function(state, *args)`` there; messages name it by its ``label``, if it has one."""
        assert self._running is None, f"{self.name} is still busy with {self._running}"
        self._running = label or function.__name__
        try:
            wire.send(self._pipe, (function, args), fds)
        except OSError:
            raise self._death() from None

    def result(self, timeout: float = SECONDS) -> Any:
        """What the function returned.

        Raises :class:`PeerError` for what it raised, :class:`PeerEnded` for the process's end, and
        :class:`PeerLate` with the stacks of its threads when it does not answer in ``timeout``
        seconds, times the scale.
        """
        __tracebackhide__ = True
        value, fds = self.result_with_fds(timeout)
        assert not fds, "the function sent descriptors: use result_with_fds"
        return value

    def result_with_fds(self, timeout: float = SECONDS) -> tuple[Any, list[int]]:
        """As :meth:`result`, with the descriptors that came along."""
        __tracebackhide__ = True
        if not self._pipe.poll(timeout * self._scale):
            stacks = self._stacks()
            self.kill()
            raise PeerLate(
                f"{self.name} did not end {self._running} in {in_seconds(timeout * self._scale)} and was "
                f"killed; its threads:\n{stacks}"
            )
        try:
            (good, value), fds = wire.receive(self._pipe)
        except (EOFError, OSError):
            raise self._death() from None
        self._running = None
        if not good:
            kinds, text = value
            raise PeerError(f"in {self.name}: {text}", kinds)
        return value, fds

    def do(
        self, function: Callable[..., Any], *args: Any, timeout: float = SECONDS,
        fds: Sequence[int] = (),
    ) -> Any:  # fmt: skip
        """Run a function and return its result; see :meth:`result`."""
        __tracebackhide__ = True
        self.begin(function, *args, fds=fds)
        return self.result(timeout)

    def pause(self) -> None:
        """SIGSTOP, and wait until every thread has stopped. Raises :class:`PeerError` if one does not."""
        self._popen.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.pid}/task")
        end = time.monotonic() + SECONDS * self._scale
        while any(_state(task) not in "TtZX" for task in tasks.iterdir()):
            if time.monotonic() > end:
                raise PeerError(f"{self.name} did not stop in {in_seconds(SECONDS * self._scale)}")
            time.sleep(0.001)

    def resume(self) -> None:
        """SIGCONT."""
        self._popen.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End the process without a chance to clean up."""
        self.ended = True
        self._popen.kill()
        self._popen.wait(SECONDS)

    def close(self) -> None:
        """End the process in order; kill it when it is busy, stopped or slow."""
        self._pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(0 if self._running else 5 * self._scale)
        self.kill()
        self._stacks_file.close()

    def crashed(self) -> bool:
        """Whether it has ended by itself."""
        return not self.ended and self._popen.poll() is not None

    def crash(self) -> PeerEnded:
        """How it ended by itself: the signal, in which test, and what it said at last."""
        return self._death()

    def _death(self) -> PeerEnded:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(SECONDS)
        code = self._popen.returncode
        self.ended = True
        how = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"status {code}"
        doing = f"in {self._running}" if self._running else "while nothing was asked of it"
        last = self._stderr.last_lines()
        return PeerEnded(
            f"{self.name} ended with {how} {doing}, in the test {running_test()}; "
            + (f"its last lines of stderr:\n{last}" if last else "it wrote nothing to stderr")
        )

    def _stacks(self) -> str:
        self.resume()
        self._popen.send_signal(signal.SIGUSR1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(STACKS_SECONDS)
        self._stacks_file.seek(0)
        return self._stacks_file.read().decode(errors="replace")


def _state(task: Path) -> str:
    """A thread's state, as proc(5) names it; X for one that has ended meanwhile."""
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"

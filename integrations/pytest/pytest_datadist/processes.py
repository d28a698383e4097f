"""Processes of this machine, as /proc tells of them."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
"""What Python starts for itself and keeps; in their command lines."""


@dataclass(frozen=True)
class Found:
    """A process; pid and start time tell it from any other one."""

    pid: int
    started: int
    parent: int = field(compare=False)
    state: str = field(compare=False)
    command: str = field(compare=False)

    def __str__(self) -> str:
        return f"process {self.pid} ({self.command})"


def everything() -> list[Found]:
    """All processes that can be seen, but for those that have ended."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    found = [each for pid in pids if (each := look(pid)) is not None]
    return [each for each in found if each.state not in "ZX"]


def look(pid: int) -> Found | None:
    """A process, or None where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return None
    name, _, rest = text.partition("(")[2].rpartition(")")
    fields = rest.split()
    command = line.replace(b"\0", b" ").decode(errors="replace").strip() or name
    return Found(pid, int(fields[19]), int(fields[1]), fields[0], command[:200])


def descendants(pid: int, among: Sequence[Found] | None = None) -> set[Found]:
    """The children of a process, their children and so on, but for Python's own helpers."""
    known = everything() if among is None else among
    found: set[Found] = set()
    parents = {pid}
    while parents:
        children = {each for each in known if each.parent in parents} - found
        found |= children
        parents = {each.pid for each in children}
    return found - helpers(known)


def helpers(among: Sequence[Found]) -> set[Found]:
    """Python's own helpers; what a fork server forks has the same command line, and is none."""
    like = {each.pid: each for each in among if any(name in each.command for name in HELPERS)}
    return {each for each in like.values() if each.parent not in like}


def with_variable(assignment: str, among: Iterable[Found]) -> set[Found]:
    """Those that were started with ``NAME=VALUE`` in their environment."""
    wanted = os.fsencode(assignment)
    return {each for each in among if wanted in _environment(each.pid)}


def _environment(pid: int) -> list[bytes]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return []


def kill(found: Iterable[Found], seconds: float) -> None:
    """SIGKILL, and wait for the ends: at most ``seconds`` for each."""
    for each in found:
        with _pidfd(each) as pidfd:
            if pidfd is not None:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                poll = select.poll()
                poll.register(pidfd, select.POLLIN)
                poll.poll(seconds * 1000)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(each.pid, os.WNOHANG)


@contextlib.contextmanager
def _pidfd(process: Found) -> Iterator[int | None]:
    """A descriptor of the process; None where another one has its pid, or none."""
    pidfd = None
    try:
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(process.pid)
        same = pidfd is not None and look(process.pid) == process
        with contextlib.suppress(ProcessLookupError):
            yield pidfd if same else None
    finally:
        if pidfd is not None:
            os.close(pidfd)

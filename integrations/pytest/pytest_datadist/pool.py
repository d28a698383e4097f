"""Processes that wait for tests: a start costs most of a second, so they are kept."""

from __future__ import annotations

import pickle
from contextlib import ExitStack
from typing import TYPE_CHECKING

from pytest_datadist import remote
from pytest_datadist.errors import WorkerError
from pytest_datadist.processes import descendants, kill

if TYPE_CHECKING:
    from datadist.testing.processes import Process

KEPT = 8
"""Most processes that wait."""
SECONDS = 60.0


class Pool:
    """The processes of one pytest process."""

    def __init__(self) -> None:
        self._idle: list[Process] = []
        self._all: list[Process] = []

    @property
    def pids(self) -> set[int]:
        """Of all processes that live."""
        return {process.pid for process in self._all}

    def take(self, count: int) -> list[Process]:
        """So many processes; :meth:`give_back` or :meth:`discard` each one."""
        taken: list[Process] = []
        try:
            while self._idle and len(taken) < count:
                process = self._idle.pop()
                taken.append(process)
                process.forget_stderr()
                if process.crashed():
                    self.discard(taken.pop())
            new = [self._start(taken) for _ in range(count - len(taken))]
            for process in new:
                _check_warm(process)
        except BaseException:
            for process in taken:
                self.discard(process)
            raise
        return taken

    def _start(self, taken: list[Process]) -> Process:
        from datadist.testing.processes import Process

        process = Process("a new worker", {}, 1.0)
        self._all.append(process)
        taken.append(process)
        process.begin(remote.warm)
        return process

    def give_back(self, process: Process) -> None:
        """Keep a process, which is as good as new, for the next test."""
        if len(self._idle) < KEPT:
            self._idle.append(process)
        else:
            self.discard(process)

    def discard(self, process: Process) -> None:
        """Kill a process and its children."""
        children = descendants(process.pid)
        process.kill()
        process.close()
        kill(children, SECONDS)
        self._all = [each for each in self._all if each is not process]

    def close(self) -> None:
        """End all processes."""
        self._idle = []
        with ExitStack() as stack:
            for process in self._all:
                stack.callback(self.discard, process)


def _check_warm(process: Process) -> None:
    found = process.result(SECONDS)
    if isinstance(found, remote.Raised):
        raise WorkerError(f"a worker could not start: {found.text}")
    pickle.loads(found)

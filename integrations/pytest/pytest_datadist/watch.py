"""What a test leaves outside of its workers: it is named, and then cleaned."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pytest_datadist.environment import JOB
from pytest_datadist.held import Held
from pytest_datadist.isolation import Isolation
from pytest_datadist.memory import SHM, shared_memory, unlink
from pytest_datadist.processes import (
    Found,
    descendants,
    everything,
    helpers,
    kill,
    with_variable,
)

SECONDS = 10.0
_OF_CLUSTER = re.compile(r"^\.?(\d{1,20})[-@]")


class Watch:
    """Looks at this process, at others and at directories, before a test and after it."""

    def __init__(self, isolation: Isolation, own_pids: Callable[[], set[int]]) -> None:
        self._isolation = isolation
        self._own_pids = own_pids
        """Of the processes that wait for tests."""
        self._held = Held.now()
        self._processes = descendants(os.getpid())
        self._shm = _shm_names()

    def left(self) -> list[str]:
        """What the test left, in words; it is cleaned."""
        texts = self._held.left_since()
        found = self._new_processes()
        memory = {each for process in found for each in shared_memory(process.pid)}
        entries = [] if found else self._entries()
        kill(found, SECONDS)
        for each in memory | self._isolation.ended_memory:
            if each.name is not None and each.name not in self._shm:
                unlink(each)
        texts += sorted(f"{each}, which still ran" for each in found)
        return texts + entries

    def _new_processes(self) -> set[Found]:
        """Our new descendants, and whoever was started with this test's job, whosever child it is now."""
        among = everything()
        new = descendants(os.getpid(), among) - self._processes
        own = self._own_pids()
        own |= {each.pid for pid in own for each in descendants(pid, among)}
        new |= with_variable(f"{JOB}={self._isolation.job}", among) - helpers(among)
        return {each for each in new if each.pid not in own and each.pid != os.getpid()}

    def _entries(self) -> list[str]:
        """What is in the runtime directory, by engine."""
        root = self._isolation.runtime_dir
        texts: dict[str, str] = {}
        for path in sorted(root.rglob("*")):
            if path.is_dir():
                continue
            match = _OF_CLUSTER.match(path.name)
            if match is None:
                texts[path.name] = f"{path.relative_to(root)} in the runtime directory"
            elif int(match[1]) not in self._isolation.ended_clusters:
                texts[match[1]] = _described(match[1], path)
        return list(texts.values())


def _described(cluster: str, path: Path) -> str:
    if _is_listening(path):
        return f"an engine with cluster id {cluster}, which still runs"
    return (
        f"names of the engine with cluster id {cluster} in the runtime directory: its process has ended "
        "without finalize()"
    )


def _is_listening(path: Path) -> bool:
    with suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        return True
    return False


def _shm_names() -> set[str]:
    with suppress(OSError):
        return set(os.listdir(SHM))
    return set()

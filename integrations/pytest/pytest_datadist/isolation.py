"""What keeps the engines of a test from those of all others: a job, a runtime directory, ports."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from pytest_datadist import ports
from pytest_datadist.environment import JOB, RUNTIME_DIR, replace
from pytest_datadist.memory import SharedMemory, shared_memory


class Isolation:
    """The surroundings of one test; they are in its environment too, for the processes that it starts."""

    def __init__(self, folder: Path, job: str) -> None:
        self.job = job
        """``DATADIST_JOB``."""
        self.runtime_dir = folder
        """``DATADIST_RUNTIME_DIR``."""
        self.ended_clusters: set[int] = set()
        """Cluster ids of engines that were killed on purpose."""
        self.ended_memory: set[SharedMemory] = set()
        """What processes held that were killed on purpose."""
        self._before: dict[str, str | None] = {}

    @property
    def environ(self) -> dict[str, str]:
        """The variables."""
        return {JOB: self.job, RUNTIME_DIR: str(self.runtime_dir)}

    def free_ports(self, count: int) -> list[int]:
        """So many ports of loopback that nobody uses; pytest-xdist's workers get different ones.

        Where a program can say which port it has, let it listen at port 0 instead: that is safe.
        """
        return ports.free(count)

    def enter(self) -> None:
        """Make the directory, and the one it is in, and set the variables."""
        for folder in (self.runtime_dir.parent, self.runtime_dir):
            folder.mkdir(mode=0o700, exist_ok=True)
            os.chmod(folder, 0o700)  # whatever the umask is
        self._before |= replace(self.environ)

    def leave(self) -> None:
        """Undo :meth:`enter`."""
        replace(self._before)
        shutil.rmtree(self.runtime_dir, ignore_errors=True)
        with suppress(OSError):
            self.runtime_dir.parent.rmdir()

    def expect_end(self, pid: int, cluster_id: int) -> None:
        """A process of a worker is about to be killed: what it leaves is not the test's."""
        self.ended_clusters.add(cluster_id)
        self.ended_memory |= shared_memory(pid)

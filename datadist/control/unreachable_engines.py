"""Engines of this user that ours cannot link with: in another job or another runtime directory."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from datadist.control.job import XDIST
from datadist.control.job import described as job_described
from datadist.control.process import described, peer_of, processes_of_this_user, program_of
from datadist.control.runtime_dir import Address, RuntimeDir, engine_of, job_of, place_of

MAX_ENGINES = 32
"""Engines that are remembered."""


@dataclass(frozen=True)
class UnreachableEngine:
    """A live engine of this user in another job or another runtime directory."""

    cluster_id: int
    pid: int
    program: str
    directory: Path
    job: str
    same_directory: bool

    def __str__(self) -> str:
        who = described(self.pid, self.program)
        if self.same_directory:
            return (
                f"{who} is in {job_described(self.job)}: if it is meant, set the same DATADIST_JOB"
            )
        return (
            f"{who} is in {job_described(self.job)} of runtime directory {self.directory}: if it is "
            "meant, set the same DATADIST_RUNTIME_DIR and DATADIST_JOB"
        )


def find_unreachable_engines(own: RuntimeDir, clusters: Iterable[int]) -> list[UnreachableEngine]:
    """Engines with these cluster ids outside of our job.

    It looks through /proc, which takes milliseconds: not on the reactor.
    """
    wanted = set(clusters)
    found: list[UnreachableEngine] = []
    for place in _places(own):
        directory, job = job_of(place)
        with suppress(OSError):
            same = os.path.samefile(directory, own.path)
            if not same and job.startswith(
                XDIST
            ):  # a job of another pytest run, which is never meant
                continue
            for engine, pid in _live(place, wanted):
                found.append(
                    UnreachableEngine(engine.cluster_id, pid, program_of(pid), directory, job, same)
                )
    return sorted(found, key=lambda each: not each.same_directory)[:MAX_ENGINES]


def _places(own: RuntimeDir) -> list[Path]:
    """Directories other than ours in which engines of this user listen."""
    places = {place_of(own.path, job) for job in own.other_jobs()}
    places |= {Path(target) for pid in processes_of_this_user() for target in _directories(pid)}
    others = []
    for place in sorted(places):
        with suppress(OSError):
            if not os.path.samefile(place, own.place) and any(map(engine_of, os.listdir(place))):
                others.append(place)
    return others


def _directories(pid: int) -> Iterator[str]:
    """Directories that a process holds open, as an engine does with its part of the runtime directory."""
    folder = f"/proc/{pid}/fd"
    with suppress(OSError):  # it has ended, or access is not permitted
        for name in os.listdir(folder):
            with suppress(OSError):
                target = os.readlink(f"{folder}/{name}")
                if target.startswith("/") and os.path.isdir(target):
                    yield target


def _live(place: Path, wanted: set[int]) -> Iterator[tuple[Address, int]]:
    """The engines there with these cluster ids that answer, and their processes."""
    folder = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in os.listdir(folder):
            engine = engine_of(name)
            if engine is None or engine.cluster_id not in wanted:
                continue
            with suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
                sock.setblocking(False)
                sock.connect(f"/proc/self/fd/{folder}/{name}")
                yield engine, peer_of(sock)[0]
    finally:
        os.close(folder)

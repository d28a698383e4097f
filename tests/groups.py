"""Control groups that tests make for their processes, of either version."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")
SECONDS = 60.0
_numbers = itertools.count()


@contextmanager
def group(controller: str, *limits: Mapping[str, int]) -> Iterator[Path]:
    """A group with the limits that fit its version (by names of files); skips where none can be made."""
    problems = []
    for parent in (ROOT / controller, ROOT):
        path = parent / f"datadist-test-{os.getpid()}-{next(_numbers)}"
        try:
            _make(path, limits)
        except (OSError, StopIteration) as error:
            problems.append(f"{parent}: {error}")
            continue
        try:
            yield path
        finally:
            remove(path)
        return
    pytest.skip(f"no {controller} cgroup can be made here: {'; '.join(problems)}")


def _make(path: Path, limits: tuple[Mapping[str, int], ...]) -> None:
    path.mkdir()
    try:
        chosen = next(each for each in limits if all((path / name).exists() for name in each))
        for name, value in chosen.items():
            (path / name).write_text(str(value))
    except BaseException:
        path.rmdir()
        raise


def remove(path: Path) -> None:
    """As soon as its processes have gone."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            path.rmdir()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def enter(path: Path, pid: int) -> None:
    """Move a process, with all its threads, into a group."""
    (path / "cgroup.procs").write_text(str(pid))

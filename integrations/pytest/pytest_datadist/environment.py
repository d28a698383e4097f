"""The environment of one pytest process: its job, and the runtime directory of its engines.

Variables that the user has set stay as they are. Those of an outer pytest run, from which this one was
started, are replaced.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path

JOB = "DATADIST_JOB"
RUNTIME_DIR = "DATADIST_RUNTIME_DIR"
PREFIX = "pytest-datadist-"
"""How names of ours begin."""


class Environment:
    """What :meth:`set` sets and :meth:`restore` takes back."""

    def __init__(self) -> None:
        run = os.environ.get("PYTEST_XDIST_TESTRUNUID") or uuid.uuid4().hex
        self.name = f"{PREFIX}{run[:12]}-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}"
        self.folder = Path(tempfile.gettempdir(), self.name)
        """Made by the first engine that needs it."""
        self.tests_folder = Path(f"{self.folder}-tests")
        """Made by a test that needs it, which has a folder in it, and removed at its end."""
        self._before: dict[str, str | None] = {}

    def set(self) -> None:
        """Give this process, and those that it starts, a job and a runtime directory of its own."""
        own = {JOB: self.name, RUNTIME_DIR: str(self.folder)}
        chosen = {name: value for name, value in own.items() if not _is_users(os.environ.get(name))}
        self._before |= replace(chosen)

    def restore(self) -> None:
        """Undo :meth:`set`, and remove the directories."""
        replace(self._before)
        self.remove()

    def remove(self) -> None:
        """Remove the directories."""
        for folder in (self.folder, self.tests_folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_users(value: str | None) -> bool:
    return value is not None and not Path(value).name.startswith(PREFIX)


def replace(values: Mapping[str, str | None]) -> dict[str, str | None]:
    """Set variables, or remove those that are None; what they were."""
    before = {name: os.environ.get(name) for name in values}
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    return before

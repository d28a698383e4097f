"""Runs of pytest with the plugin, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PLUGIN = Path(__file__).parents[1]
SECONDS = 300.0
LEFT_SECONDS = 20.0
OWN = ("PYTEST", "DATADIST_", "COV_", "COVERAGE_")
"""How variables of the outer run begin."""


@dataclass(frozen=True)
class Ran:
    """What came of it."""

    folder: Path
    status: int
    output: str
    outcomes: Mapping[str, str]
    """By the name of the test: ``passed``, ``failed``, ``error`` (at setup or teardown), ``skipped``."""
    texts: Mapping[str, str]
    """What is reported of each test that did not pass."""

    def names(self, outcome: str) -> set[str]:
        """The tests that ended like this."""
        return {name for name, each in self.outcomes.items() if each == outcome}


def environ(**more: str) -> dict[str, str]:
    """The environment without what the outer run has set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OWN)}
    path = os.pathsep.join([str(PLUGIN), *filter(None, [kept.get("PYTHONPATH")])])
    return {**kept, "PYTHONPATH": path, "DATADIST_BACKEND": "shm", **more}


def run(folder: Path, *arguments: str, plugin: bool = True, **more: str) -> Ran:
    """Run pytest in a folder; ``more`` are variables of its environment."""
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junit-xml={report}"]
    command += ["-p", "pytest_datadist.plugin"] if plugin else []
    done = subprocess.run(
        [*command, *arguments], cwd=folder, env=environ(**more), check=False, timeout=SECONDS,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    outcomes: dict[str, str] = {}
    texts: dict[str, str] = {}
    for case in ET.parse(report).iter("testcase"):
        name = case.attrib["name"]
        for kind, outcome in (("failure", "failed"), ("error", "error"), ("skipped", "skipped")):
            for each in case.iter(kind):
                outcomes[name] = outcome
                texts[name] = texts.get(name, "") + (each.text or "")
        outcomes.setdefault(name, "passed")
    return Ran(folder, done.returncode, done.stdout, outcomes, texts)


def left_running(assignment: str) -> list[str]:
    """Processes that were started with a variable, once there was time to end.

    Helpers of multiprocessing end after the process that started them.
    """
    deadline = time.monotonic() + LEFT_SECONDS
    while (found := _processes(assignment)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def _processes(assignment: str) -> list[str]:
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                environment = (path / "environ").read_bytes().split(b"\0")
                if assignment.encode() in environment:
                    found.append((path / "cmdline").read_bytes().decode(errors="replace"))
            except OSError:
                continue
    return found


def write(folder: Path, text: str, ini: str = "") -> None:
    """A test module, and the configuration."""
    (folder / "test_it.py").write_text(text)
    (folder / "pytest.ini").write_text(f"[pytest]\n{ini}")

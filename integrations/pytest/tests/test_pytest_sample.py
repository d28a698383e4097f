"""The sample of a serving stack passes with four workers, and leaves nothing on the machine."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from tests.inner_run import run

SECONDS = 60.0
SAMPLE = Path(__file__).parents[3] / "examples" / "serving"


def _processes(assignment: str) -> list[str]:
    """Processes with a variable in the environment that they were started with."""
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


def test_the_sample_passes_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "serving"
    shutil.copytree(SAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    ran = run(folder, "-n", "4", "-p", "no:randomly", TMPDIR=str(temporary), SAMPLE=str(tmp_path))
    assert ran.status == 0, ran.output
    assert len(ran.names("passed")) == len(ran.outcomes) >= 9
    deadline = time.monotonic() + SECONDS
    while (left_running := _processes(f"SAMPLE={tmp_path}")) and time.monotonic() < deadline:
        time.sleep(
            0.05
        )  # Python's resource tracker ends a moment after the process that started it
    assert left_running == []
    left = [path for path in temporary.iterdir() if not path.name.startswith("pytest-of-")]
    assert left == []
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("pytest")]

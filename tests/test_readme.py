"""The example on the first screen of the README runs as it is printed there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from release.distributions import DISTRIBUTIONS, project

README = Path(__file__).parents[1] / "README.md"
SECONDS = 60.0


def _block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.M | re.S)
    assert isinstance(found, str)
    return found


def test_the_example_runs(tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(_block("python"))
    (tmp_path / "ranks.json").write_text(_block("json"))
    environ = {**os.environ, "DATADIST_RUNTIME_DIR": str(tmp_path / "run")}
    environ |= {"DATADIST_BACKEND": "shm"}
    running = [
        subprocess.Popen(
            [sys.executable, "example.py", str(me)],
            cwd=tmp_path,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for me in (1, 2)
    ]
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert outputs == ["", "[1. 1. 1. 1.]\n"]
    assert [process.returncode for process in running] == [0, 0]


def test_extras_are_those_of_the_project() -> None:
    (table,) = re.findall(r"^\| Extra \|.*\n\|[-|]+\n((?:\|.*\n)+)", README.read_text(), re.M)
    named = {
        name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert named == set(project(DISTRIBUTIONS[0])["optional-dependencies"])


def test_the_example_is_as_short_as_it_says() -> None:
    lines = [line for line in _block("python").splitlines() if line and "import" not in line]
    assert len(lines) == 12

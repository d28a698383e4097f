"""The examples of programs run, each in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

OVERLAP = Path(__file__).parents[1] / "examples" / "overlap"
SECONDS = 100.0
WAYS = {
    "overlap_asyncio": ["one after another", "asyncio"],
    "overlap_threads": ["one after another", "threads"],
    "overlap_all": ["one after another", "threads", "asyncio"],
}


def test_every_program_is_run() -> None:
    programs = {path.stem for path in OVERLAP.glob("*.py")}
    assert programs == {*WAYS, "overlap_world"}


@pytest.mark.parametrize("name", WAYS)
def test_pulls_overlap_and_bring_what_they_are_to(name: str) -> None:
    environ = {**os.environ, "DATADIST_BACKEND": "shm"}
    done = subprocess.run(
        [sys.executable, str(OVERLAP / f"{name}.py")],
        env=environ, capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == WAYS[name] * 3
    assert all("64 pulls from 4 owners in " in line for line in lines)

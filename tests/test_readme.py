"""The first screen of the README: its program runs as it says there, whichever half is started first."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from release.distributions import DISTRIBUTIONS, project
from tests.docs.blocks import ROOT, Block, all_blocks
from tests.docs.shell import commands_of

SECONDS = 60.0
BLOCKS = [block for block in all_blocks() if block.page == "README.md"]


def _block(first: str) -> Block:
    (found,) = (block for block in BLOCKS if block.first == first)
    return found


def _start(command: str, folder: Path, environ: dict[str, str]) -> subprocess.Popen[str]:
    name, *arguments = shlex.split(command, comments=True)
    assert name.endswith("/.venv/bin/python")
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_the_program_runs_in_both_orders(order: tuple[int, int], tmp_path: Path) -> None:
    """The second one is started when the first one has said for whom it waits."""
    enter, *commands = commands_of(_block("cd examples/first").text)
    folder = ROOT / enter.split()[1]
    environ = os.environ | {
        "DATADIST_RUNTIME_DIR": str(tmp_path / "run"),
        "DATADIST_JOB": "readme",
        "DATADIST_BACKEND": "shm",
    }
    started: dict[int, subprocess.Popen[str]] = {}
    try:
        for me in order:
            started[me] = process = _start(commands[me - 1], folder, environ)
            assert process.stdout is not None
            waits = f"cluster {me} waits up to 600 s for cluster {3 - me}\n"
            assert process.stdout.readline() == waits
        said = {me: process.communicate(timeout=SECONDS) for me, process in started.items()}
    finally:
        for process in started.values():
            process.kill()
            process.wait()
    assert {me: out for me, (out, _) in said.items()} == {1: "", 2: "[1. 1. 1. 1.]\n"}, said
    assert [process.returncode for process in started.values()] == [0, 0]


def test_the_program_is_short() -> None:
    (program,) = (block for block in BLOCKS if block.language == "python")
    lines = [line for line in program.text.splitlines() if line and "import" not in line]
    assert len(lines) <= 16


def test_extras_are_those_of_the_project() -> None:
    (table,) = re.findall(
        r"^\| Extra \|.*\n\|[-|]+\n((?:\|.*\n)+)", (ROOT / "README.md").read_text(), re.M
    )
    named = {
        name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert named == set(project(DISTRIBUTIONS[0])["optional-dependencies"])

"""Programs written for `llm_datadist` run unedited under `datadist run`, each in real processes."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent / "programs"
MEMBERS = {"xpyd": 4}
SECONDS = 100.0
WAITING = re.compile(r"^\[cluster .* is not complete after .*\n", re.M)
"""The warning that a link waits, as on a slow machine."""
NAMES = sorted(path.stem for path in PROGRAMS.glob("*.py") if path.stem != "common")


def _start(
    name: str, cluster: int, kind: str, ports: list[int], here: Path
) -> subprocess.Popen[str]:
    meet = here / "meet"
    meet.mkdir(exist_ok=True)
    command = [
        *(sys.executable, "-m", "datadist", "run", str(PROGRAMS / f"{name}.py")),
        *("--cluster_id", str(cluster), "--members", str(MEMBERS.get(name, 2))),
        *("--tensors", kind, "--meet", str(meet), "--ports", *map(str, ports)),
    ]
    environ = {**os.environ, "DATADIST_RUNTIME_DIR": str(here / "run"), "DATADIST_BACKEND": "shm"}
    return subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_a_program_runs_unedited(
    name: str, kind: str, tmp_path: Path, free_ports: Callable[[int], list[int]]
) -> None:
    if kind == "torch" and importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    ports = free_ports(2)
    clusters = range(1, MEMBERS.get(name, 2) + 1)
    running = [_start(name, cluster, kind, ports, tmp_path) for cluster in clusters]
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, output in zip(running, outputs, strict=True):
        assert (process.returncode, WAITING.sub("", output)) == (0, "done\n"), outputs

"""The scripts that the documents show run, each with a job and a runtime directory of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT
from tests.docs.scripts import RUN_BY, RUNS, Run

SECONDS = 120.0


def _start(folder: Path, script: str, environ: dict[str, str]) -> subprocess.Popen[str]:
    name, *arguments = script.rpartition("/")[2].split()
    return subprocess.Popen(
        [sys.executable, name, *arguments],
        cwd=folder, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def _is_in_order(lines: tuple[str, ...], said: str) -> bool:
    rest = iter(said.splitlines())
    return all(line in rest for line in lines)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.scripts[0])
def test_the_scripts_run(run: Run, tmp_path: Path) -> None:
    if run.needs:
        pytest.importorskip(run.needs, reason=f"{run.needs} is not installed")
    environ = os.environ | {
        "DATADIST_RUNTIME_DIR": str(tmp_path / "run"),
        "DATADIST_JOB": "docs",
        "DATADIST_BACKEND": "shm",
    }
    folder = ROOT / "examples" / run.scripts[0].partition("/")[0]
    started = [_start(folder, script, environ) for script in run.scripts]
    try:
        said = [process.communicate(timeout=SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert [process.returncode for process in started] == [0] * len(started), said
    for lines, (output, _) in zip(run.prints, said, strict=True):
        assert _is_in_order(lines, output), said


def test_every_script_is_run_by_a_test() -> None:
    """Those that a reader starts; modules that they share are imported by them."""
    shared = {"examples/guide/two_engines.py"}
    here = {"guide", "first", "prompt_decoder", "layer_by_layer", "several_hosts"}
    scripts = {
        str(path.relative_to(ROOT))
        for folder in here
        for path in (ROOT / "examples" / folder).glob("*.py")
    }
    assert scripts - shared == {path for path in RUN_BY if path.split("/")[1] in here}


def test_every_folder_has_a_page() -> None:
    names = {path.name for path in (ROOT / "examples").iterdir() if any(path.rglob("*.py"))}
    for name in names:
        assert (ROOT / "examples" / name / "README.md").is_file(), name

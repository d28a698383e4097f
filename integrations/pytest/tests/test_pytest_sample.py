"""The sample of a serving stack passes with four workers, and leaves nothing on the machine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.inner_run import left_running, run

SAMPLE = Path(__file__).parents[3] / "examples" / "serving"


def test_the_sample_passes_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "serving"
    shutil.copytree(SAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    ran = run(folder, "-n", "4", "-p", "no:randomly", TMPDIR=str(temporary), SAMPLE=str(tmp_path))
    assert ran.status == 0, ran.output
    assert len(ran.names("passed")) == len(ran.outcomes) >= 9
    assert left_running(f"SAMPLE={tmp_path}") == []
    left = [path for path in temporary.iterdir() if not path.name.startswith("pytest-of-")]
    assert left == []
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("pytest")]

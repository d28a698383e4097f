"""`.ci/tests` says what came of a run: passed, flaky, broken, or not whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKEFILE = f"""
test:
\t{sys.executable} -m pytest -q -p no:xdist -p tests.outcome $(ARGS)
"""
HANGS = "import time\n\ndef test_it():\n    time.sleep(600)\n"
FLAKY = """
from pathlib import Path

def test_it():
    was = Path("was")
    there = was.exists()
    was.touch()
    assert there
"""


def _run(place: Path, tests: str, seconds: float = 60) -> tuple[int, str]:
    (place / "Makefile").write_text(MAKEFILE)
    (place / "test_some.py").write_text(tests)
    (place / "pytest.ini").write_text("[pytest]\n")
    (place / "tests").mkdir()
    for name in ("outcome.py", "skips.py"):
        shutil.copy(ROOT / "tests" / name, place / "tests")
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "MAKE"))
    }
    done = subprocess.run(
        [ROOT / ".ci" / "tests", str(seconds), "test"],
        cwd=place, env=environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_what_passes_is_run_once(tmp_path: Path) -> None:
    status, text = _run(tmp_path, "def test_it():\n    pass\n")
    assert status == 0
    assert text.count("1 passed") == 1


def test_what_passes_the_second_time_fails_as_flaky(tmp_path: Path) -> None:
    status, text = _run(tmp_path, FLAKY)
    assert status == 1
    assert "  flaky:  test_some.py::test_it" in text


def test_what_fails_twice_is_broken(tmp_path: Path) -> None:
    status, text = _run(tmp_path, FLAKY + "\ndef test_other():\n    assert False\n")
    assert status == 1
    assert "  flaky:  test_some.py::test_it" in text
    assert "  broken: test_some.py::test_other" in text


@pytest.mark.parametrize(
    "end",
    ["import os; os._exit(3)", "raise KeyboardInterrupt", "import os; os.kill(os.getpid(), 9)"],
)
def test_a_run_that_broke_off_is_not_taken_for_its_failures(tmp_path: Path, end: str) -> None:
    status, text = _run(
        tmp_path, f"def test_one():\n    assert False\n\ndef test_two():\n    {end}\n"
    )
    assert status == 1
    assert "broke off" in text
    assert "broken:" not in text


def test_a_second_run_that_breaks_off_calls_nothing_broken(tmp_path: Path) -> None:
    ends = FLAKY.replace("assert there", "assert not there or __import__('os')._exit(3)")
    status, text = _run(tmp_path, ends.replace("assert not there or", "assert there and"))
    assert status == 1
    assert "  failed: test_some.py::test_it" in text
    assert "the second run broke off" in text


def test_a_run_that_hangs_is_ended_and_named(tmp_path: Path) -> None:
    status, text = _run(tmp_path, HANGS, 30)  # pytest must have begun
    assert status == 1
    assert "ran out of its 30 seconds" in text
    assert "test_some.py:4: KeyboardInterrupt" in text
    assert "broke off" in text

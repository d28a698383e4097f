"""`datadist conformance`, as an author of a transport uses it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from datadist.testing import installed

SETTINGS = """
from datadist.testing import TransportConformance

class Mine(TransportConformance):
    timeout_scale = 2.0
    extra = {"populate": "0"}

class Other:
    pass
"""


def _run(
    *args: str, code: str = "pass", path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    start = f"import sys; {code}; from datadist.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", start, "conformance", *args],
        env={**os.environ, **({"PYTHONPATH": str(path)} if path else {})},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_selected_tests_are_named_with_their_family() -> None:
    done = _run("shm", "-v", "-k", "Declaration")
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert lines[0].startswith("shm (datadist-shm ")
    assert "Declaration" in lines
    (at,) = [i for i, line in enumerate(lines) if line.startswith("  passed   capabilities_make_")]
    assert lines[at + 1].strip() == "Types and ranges."
    assert "none failed, version 2 of the interface" in lines[-1]


def test_skips_have_their_reason() -> None:
    done = _run("shm", "-k", "exchange_is_in_rank_order or probe_is_quick")
    assert done.returncode == 0, done.stdout
    skipped = "  skipped  exchange_is_in_rank_order: capabilities.self_bootstrapping is False"
    assert skipped in done.stdout.splitlines()


def test_options_reach_the_transport_and_failures_show_the_traceback_of_the_process() -> None:
    done = _run(
        "shm", "-k", "probe_is_quick or capabilities_are_constant", "--option", "populate=x"
    )
    assert done.returncode == 1
    assert "  FAILED   capabilities_are_constant" in done.stdout
    assert "in rank 0: Traceback (most recent call last)" in done.stdout
    assert "option datadist.shm.populate is 'x'" in done.stdout
    assert "does NOT conform" in done.stdout.splitlines()[-1]


def test_failures_are_printed_at_once_with_their_rule() -> None:
    """The next test begins after the whole text of the failure."""
    with installed({"names-all": "datadist.testing.faulty_transfers:NamesIdleWriters"}) as folder:
        done = _run("names-all", "-k", "close_names_no_rank", path=folder)
    assert done.returncode == 1, done.stdout + done.stderr
    text = done.stdout
    failed, passed = (
        text.index("  FAILED   close_names_no_rank_that_is_idle ("),
        text.index("  passed"),
    )
    rule = (
        "rule of Link.close, Capabilities.revokes_access in datadist.transport: close names no rank"
    )
    reason = text.index("close named {0, 2}, expected nobody")
    assert failed < reason < text.index(rule) < passed
    assert "failed: close_names_no_rank_that_is_idle" in text[passed:].splitlines()


def test_a_crash_names_the_test_the_signal_and_the_last_words() -> None:
    with installed({"crashes": "datadist.testing.faulty_transfers:Crashes"}) as folder:
        done = _run("crashes", "-k", "sizes[1-read]", path=folder)
    assert done.returncode == 1, done.stdout + done.stderr
    assert (
        "rank 0 ended with signal SIGSEGV in move, in the test test_sizes[1-read]; its last lines "
        "of stderr:" in done.stdout
    )
    assert "these are my last words" in done.stdout


def test_a_class_with_settings(tmp_path: Path) -> None:
    (tmp_path / "my_settings.py").write_text(SETTINGS)
    done = _run("shm", "-k", "sizes[1-read]", "--settings", "my_settings:Mine", path=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for wrong in ("my_settings:Other", "my_settings:Nothing", "no_such_module:Mine"):
        done = _run("shm", "--settings", wrong, path=tmp_path)
        assert done.returncode == 2
        assert wrong.partition(":")[0] in done.stderr


def test_nothing_that_can_run_is_no_success() -> None:
    done = _run("shm", "-k", "no_test_of_that_name")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (2, "no test was run")
    done = _run("nonsense")
    assert done.returncode == 2
    assert "'nonsense' is not installed" in done.stderr


def test_without_assertions_nothing_passes(tmp_path: Path) -> None:
    """`python -O` strips what the kit checks with."""
    done = subprocess.run(
        [sys.executable, "-O", "-m", "datadist", "conformance", "shm", "-k", "Declaration"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.stdout, done.returncode) == ("", 2)
    assert "checks with assert" in done.stderr
    (tmp_path / "test_mine.py").write_text(
        "from datadist.testing import TransportConformance\n"
        "class TestMine(TransportConformance):\n    transport = 'shm'\n"
    )
    done = subprocess.run(
        [sys.executable, "-O", "-m", "pytest", "-p", "no:cacheprovider", "-k", "capabilities_are"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "checks with assert" in done.stdout


def test_without_pytest_it_says_how_to_get_it() -> None:
    done = _run("shm", code="sys.modules['pytest'] = None")
    assert done.returncode == 2
    assert "pip install 'datadist[testing]'" in done.stderr


@pytest.mark.parametrize("args", [("--option", "x"), ("--timeout-scale", "0")])
def test_arguments_are_checked(args: tuple[str, ...]) -> None:
    done = _run("shm", *args)
    assert done.returncode == 2
    assert "error: argument" in done.stderr

"""Every command ends without a word of its own when its reader leaves, and at Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

DATADIST = [sys.executable, "-m", "datadist"]
SECONDS = 120
PRINTS = (
    "--help", "--version", "bench --help", "backends", "backends --json", "doctor --backend shm",
    "table --ranks 4", "check TABLE", "check TABLE --json", "top --once --interval 0.1",
    "top --json --interval 0.1", "demo --tokens 16", "conformance shm -k Declaration",
    "bench latency --quick", "bench latency --quick --json -",
)  # fmt: skip
WAITS = {
    "demo": "blocks of",
    "bench latency": "start two engines",
    "conformance shm -k Linking": "Linking",
    "top --json --interval 0.1": "engines",
    "top --interval 0.1": "engines",
}
"""Commands that go on for a while, and what each says when it has begun."""


@pytest.fixture
def environ(runtime_dir: Path, tmp_path: Path) -> dict[str, str]:
    """Where the commands find no engine, and a rank table."""
    table = subprocess.run([*DATADIST, "table", "--ranks", "2"], capture_output=True, check=True,
                           timeout=SECONDS)  # fmt: skip
    (tmp_path / "TABLE").write_bytes(table.stdout)
    environ = {**os.environ, "DATADIST_RUNTIME_DIR": str(runtime_dir)}
    environ.pop("PYTHONUNBUFFERED", None)  # argparse then hides that nobody reads its help
    return environ


@pytest.mark.parametrize("command", PRINTS)
def test_a_reader_that_leaves(command: str, environ: dict[str, str], tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*DATADIST, *command.split()], stdout=writer, stderr=subprocess.PIPE, cwd=tmp_path,
            env=environ, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
    finally:
        os.close(writer)
    steps = "".join(
        f"{line}\n" for line in done.stderr.splitlines() if line.startswith("latency: ")
    )
    assert (done.stderr, done.returncode) == (steps, 141)


@pytest.mark.parametrize("command", WAITS)
def test_ctrl_c_reaches_all_processes_of_a_terminal(
    command: str, environ: dict[str, str], runtime_dir: Path
) -> None:
    """Its own, which end without a traceback, and what they made is gone."""
    process = subprocess.Popen(
        [*DATADIST, *command.split()], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=environ, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )  # fmt: skip
    with process:
        try:
            assert process.stdout is not None
            said = ""
            while WAITS[command] not in said:
                line = process.stdout.readline()
                assert line, said
                said += line
            os.killpg(process.pid, signal.SIGINT)
            rest, _ = process.communicate(timeout=SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, said + rest
    assert "Traceback" not in rest
    assert "KeyboardInterrupt" not in rest
    _wait_until_gone(process.pid)


def _wait_until_gone(group: int) -> None:
    """Python's resource tracker ends a moment after the process that started it."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    pytest.fail(f"a process of group {group} is left")

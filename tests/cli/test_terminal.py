"""What a person sees in a terminal: lines that fit, and colours."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

from datadist.cli import COMMANDS

CODES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
SHOWN = (
    "backends", "doctor", "check TABLE", "demo --tokens 16", "conformance shm -k Declaration",
    "bench latency paged-mla grants small --quick", "top --count 1 --interval 0.1",
)  # fmt: skip
NARROWEST = {"backends": 44, "doctor": 44, "check TABLE": 44, "conformance shm -k Declaration": 44}


def _in_terminal(command: str, columns: int, folder: Path, runtime_dir: Path) -> str:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    environ = {**os.environ, "TERM": "xterm", "DATADIST_RUNTIME_DIR": str(runtime_dir)}
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        environ.pop(name, None)
    printed: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while chunk := os.read(ours, 1 << 16):
                printed.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "datadist", *command.split()], stdin=subprocess.DEVNULL,
            stdout=theirs, stderr=theirs, cwd=folder, env=environ, timeout=400, check=False,
        )  # fmt: skip
    finally:
        os.close(theirs)
        reader.join(60)
        os.close(ours)
    text = b"".join(printed).decode()
    assert done.returncode == 0, text
    return text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Has a rank table with the longest columns."""
    table = subprocess.run(
        [sys.executable, "-m", "datadist", "table", "--ranks", "4", "--hosts", "10.0.0.1,10.0.0.2"],
        capture_output=True, check=True, timeout=120,
    ).stdout  # fmt: skip
    (tmp_path / "TABLE").write_bytes(table)
    return tmp_path


def _longest(text: str) -> str:
    return max(re.split(r"[\r\n]+", CODES.sub("", text)), key=len)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits(command: str, tmp_path: Path, runtime_dir: Path) -> None:
    text = _in_terminal(f"{command} --help".strip(), 80, tmp_path, runtime_dir)
    assert len(_longest(text)) <= 80, _longest(text)


@pytest.mark.parametrize("command", SHOWN)
def test_lines_fit_80_columns(command: str, folder: Path, runtime_dir: Path) -> None:
    text = _in_terminal(command, 80, folder, runtime_dir)
    assert len(_longest(text)) <= 80, _longest(text)
    assert "\x1b[" in text


@pytest.mark.parametrize("command", NARROWEST)
def test_lines_fit_a_narrow_terminal(command: str, folder: Path, runtime_dir: Path) -> None:
    text = _in_terminal(command, NARROWEST[command], folder, runtime_dir)
    assert len(_longest(text)) <= NARROWEST[command], _longest(text)

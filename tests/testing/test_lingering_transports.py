"""Transports whose transfers go on after their deadline pass the conformance kit, if they say so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from datadist.testing import installed

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "select"),
    [
        ("LingeringTransport", "InFlight or over_one_link or last_segment"),
        ("LingeringSocketTransport", "InFlight or a_stopped_peer_is_a_timeout or close_ends"),
    ],
)
def test_it_passes(name: str, select: str) -> None:
    with installed({"lingers": f"tests.lingering_transports:{name}"}) as folder:
        done = subprocess.run(
            [sys.executable, "-m", "datadist", "conformance", "lingers",
             "-k", select],
            env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr

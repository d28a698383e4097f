"""Transports whose transfers go on after their deadline pass the conformance kit, if they say so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from datadist.testing import installed

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["LingeringTransport", "LingeringSocketTransport"])
def test_it_passes(name: str) -> None:
    with installed({"lingers": f"tests.lingering_transports:{name}"}) as folder:
        done = subprocess.run(
            [sys.executable, "-m", "datadist", "conformance", "lingers",
             "-k", "InFlight or Parallel or timeout or deadline or close_ends"],
            env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr

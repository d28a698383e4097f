"""The conformance kit catches every transport that breaks a rule, by the test that is meant to."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from datadist.testing import installed
from datadist.testing.saboteurs import SABOTEURS, Saboteur


@pytest.mark.parametrize("saboteur", SABOTEURS, ids=lambda s: s.transport_class.__name__)
def test_it_is_caught(saboteur: Saboteur) -> None:
    with installed({saboteur.name: saboteur.target}) as folder:
        done = subprocess.run(
            [sys.executable, "-m", "datadist", "conformance", saboteur.name,
             "-k", saboteur.caught_by],
            env={**os.environ, "PYTHONPATH": str(folder)},
            capture_output=True, text=True, timeout=180, check=False,
        )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("  FAILED")]
    assert saboteur.caught_by in failed, done.stdout

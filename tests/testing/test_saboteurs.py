"""The conformance kit catches every transport that breaks a rule, by the test that is meant to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from datadist.testing import installed
from datadist.testing.saboteurs import SABOTEURS, Saboteur
from tests.modest_transport import MODEST_SABOTEURS
from tests.socket_saboteurs import SOCKET_SABOTEURS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "saboteur",
    SABOTEURS + SOCKET_SABOTEURS + MODEST_SABOTEURS,
    ids=lambda s: f"{s.transport_class.__name__}-{s.caught_by}",
)
def test_it_is_caught(saboteur: Saboteur) -> None:
    with installed({saboteur.name: saboteur.target}) as folder:
        done = subprocess.run(
            [sys.executable, "-m", "datadist", "conformance", saboteur.name,
             "-k", saboteur.caught_by],
            env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
            capture_output=True, text=True, timeout=180, check=False,
        )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("  FAILED")]
    assert saboteur.caught_by in failed, done.stdout

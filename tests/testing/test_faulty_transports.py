"""The conformance kit catches every transport that breaks a rule, by the test that is meant to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from datadist.testing import installed
from datadist.testing.faulty_transfers import FAULTY_TRANSFERS
from datadist.testing.faulty_transports import FAULTY_TRANSPORTS, FaultyTransport
from tests.faulty_socket_transports import FAULTY_SOCKET_TRANSPORTS
from tests.minimal_transport import MINIMAL_FAULTY_TRANSPORTS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "faulty",
    FAULTY_TRANSPORTS + FAULTY_TRANSFERS + FAULTY_SOCKET_TRANSPORTS + MINIMAL_FAULTY_TRANSPORTS,
    ids=lambda s: f"{s.transport_class.__name__}-{s.caught_by}",
)
def test_it_is_caught(faulty: FaultyTransport) -> None:
    settings = ["--settings", faulty.settings] if faulty.settings else []
    with installed({faulty.name: faulty.target}) as folder:
        done = subprocess.run(
            [sys.executable, "-m", "datadist", "conformance", faulty.name,
             "-k", faulty.caught_by, *settings],
            env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
            capture_output=True, text=True, timeout=180, check=False,
        )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("  FAILED")]
    assert faulty.caught_by in failed, done.stdout

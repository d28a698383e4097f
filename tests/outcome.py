"""What came of a run of tests, where `.ci/tests` asks: the status of pytest and the tests that failed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

RECORD = "DATADIST_TESTS_RECORD"
"""Names the file to write."""


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write it down, once: not in the processes of pytest-xdist."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if RECORD not in os.environ or hasattr(session.config, "workerinput") or reporter is None:
        return
    bad = [*reporter.getreports("failed"), *reporter.getreports("error")]
    failed = sorted({report.nodeid for report in bad})
    found = {"status": int(exitstatus), "failed": failed}
    Path(os.environ[RECORD]).write_text(json.dumps(found))

"""Skipped tests: counted by reason, and failures where this machine has to run them all.

``DATADIST_TESTS_REQUIRED=1`` says the latter, as in CI. Then a test may be skipped for what no
preparation of a machine can change, and for nothing else.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Generator

import pytest

REQUIRED = "DATADIST_TESTS_REQUIRED"
UNCHANGEABLE = re.compile(
    r"capabilities\b"  # a transport does not have what a test of the kit is about
    r"|(offers|regions|links) of this transport "
    r"|far is (False|'directories')"
    r"|the transport (ucx|nixl) is not installed$"  # a later step of CI has them
    r"|nixl: NIXL is not installed"
    r"|this Python is "
    r"|a sanitizer (ends a process |takes all processors for idle)"  # the same tests run without it
    r"|this machine has (RDMA|(no )?huge pages for shared memory)$"
)
"""How reasons begin that hold in CI too."""


def is_required() -> bool:
    """Whether tests that cannot run here are failures."""
    return os.environ.get(REQUIRED) == "1"


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why something was skipped."""
    place = report.longrepr
    text = place[2] if isinstance(place, tuple) else str(place)
    return text.removeprefix("Skipped: ")


def _check_request(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail") and is_required():
        reason = reason_of(report)
        if not UNCHANGEABLE.match(reason):
            report.outcome = "failed"
            report.longrepr = (
                f"{report.nodeid} must run where {REQUIRED}=1, and was skipped: {reason}"
            )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip that is not permitted into a failure."""
    report = yield
    _check_request(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Turn a skip of a whole module that is not permitted into a failure."""
    report = yield
    _check_request(report)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show how many tests were skipped for which reason."""
    skipped = Counter(map(reason_of, terminalreporter.getreports("skipped")))
    if skipped:
        terminalreporter.section("skipped, by reason")
        for reason, count in sorted(skipped.items(), key=lambda item: (-item[1], item[0])):
            terminalreporter.line(f"{count:5}  {reason}")

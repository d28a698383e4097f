"""Tests of this folder run in virtual machines.

Outside of one, their results come from there: the tests that were chosen are run in a guest by the
same command, which writes its reports down as they come, and they are replayed here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from roce.harness.kernel import Unavailable
from roce.harness.run import GUEST, RESULTS, run

from tests.skips import is_required


class InGuest:
    """Writes reports down for the host."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._file = open("/run/out/reports", "w")  # noqa: SIM115 - closed with the process

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One line per report; its text survives whatever happens to the machine afterwards."""
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        print(json.dumps(data), file=self._file, flush=True)


class OnHost:
    """Replays what guests reported."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._reports: dict[str, list[dict[str, Any]]] = {}
        self._trouble: dict[str, str] = {}
        self._skipped: dict[str, str] = {}
        self._measured: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Instead of running a test, show its reports."""
        group = _group(item)
        if group is None:
            return None
        if group not in self._trouble:
            self._run(group, [i.nodeid for i in item.session.items if _group(i) == group])
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports_of(item, group):
            item.ihook.pytest_runtest_logreport(report=report)
            if report.when == "teardown":
                self._measured += [f"{what}: {value}" for what, value in report.user_properties]
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Show what tests measured: their ``record_property`` calls."""
        if self._measured:
            terminalreporter.section("measured")
            for line in self._measured:
                terminalreporter.line(line)

    def _run(self, group: str, tests: Sequence[str]) -> None:
        try:
            reports, self._trouble[group] = run(group, tests)
        except Unavailable as error:
            self._trouble[group] = f"the virtual machines cannot run here: {error}"
            if not is_required():
                self._skipped[group] = self._trouble[group]
            return
        if reports.exists():
            for line in reports.read_text().splitlines():
                data = json.loads(line)
                self._reports.setdefault(data["nodeid"], []).append(data)

    def _reports_of(self, item: pytest.Item, group: str) -> list[pytest.TestReport]:
        found = self._reports.get(item.nodeid, [])
        replayed = [
            self._config.hook.pytest_report_from_serializable(config=self._config, data=data)
            for data in found
        ]
        for report in replayed:
            if isinstance(report.longrepr, list):  # file, line and reason of a skip, by way of JSON
                report.longrepr = tuple(report.longrepr)
        if any(data["when"] == "teardown" for data in found):
            return replayed
        if group in self._skipped:
            place = (str(item.path), 0, f"Skipped: {self._skipped[group]}")
            return [_report(item, "skipped", place)]
        why = self._trouble[group] or "the guest reported no result of this test"
        self._trouble[group] = f"no result: see the first failure, and {RESULTS / group}"
        return [*replayed, _report(item, "failed", why)]


def _report(item: pytest.Item, outcome: Any, text: Any) -> pytest.TestReport:
    return pytest.TestReport(item.nodeid, item.location, {}, outcome, text, "setup")


def _group(item: pytest.Item) -> str | None:
    folder = Path(item.path).parent
    return folder.name if folder.parent == Path(__file__).parent else None


def pytest_configure(config: pytest.Config) -> None:
    """Take the role of this machine."""
    config.pluginmanager.register(InGuest(config) if GUEST in os.environ else OnHost(config))

"""Reports: what `datadist top` shows of an engine. They cost nothing unless somebody asks.

A process of the same user connects to the engine's socket, says ``ask_report`` and gets one
``report``. A helper thread counts, so that neither transfers nor the control thread wait.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Any

from datadist.base.version import own_version
from datadist.base.workers import Workers
from datadist.control.messages import Report
from datadist.control.process import own_program
from datadist.control.session import Session

log = logging.getLogger("datadist.control")

FORMAT = 1
"""Of the report; a reader takes what it knows of others."""
MAX_LINKS = 4096
"""Links that a report lists; ``links_left_out`` counts the others."""


class Reports:
    """Builds a report for all who ask at the time, and sends it to each; runs on the reactor."""

    def __init__(
        self,
        helpers: Workers,
        post: Callable[[Callable[[], None]], object],
        count: Callable[[], dict[str, Any]],
    ) -> None:
        self._helpers = helpers
        self._post = post
        self._count = count
        self._began = time.monotonic()
        self._asking: list[Session] = []

    def ask(self, session: Session) -> None:
        """Have a report sent to the process there."""
        if session in self._asking:
            return
        self._asking.append(session)
        if len(self._asking) == 1:
            self._helpers.submit(self._build, owner=self)

    def _build(self) -> None:
        report: dict[str, Any] | None = None
        try:
            report = self._report()
        except Exception:
            log.exception("a report could not be made; please report this")
        finally:
            self._post(lambda: self._answer(report))

    def _report(self) -> dict[str, Any]:
        counted = self._count()
        links = counted["links"]
        return {
            "format": FORMAT,
            "version": own_version(),
            "pid": os.getpid(),
            "program": own_program(),
            "seconds": time.monotonic() - self._began,
            **counted,
            "links": links[:MAX_LINKS],
            "links_left_out": max(0, len(links) - MAX_LINKS),
        }

    def _answer(self, report: dict[str, Any] | None) -> None:
        asking, self._asking = self._asking, []
        for session in asking:
            if report is None:
                session.close("no report could be made")
            else:
                session.send(Report(report=report))

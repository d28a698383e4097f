"""What is remembered and logged of connections that were refused, however many there are."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable

from datadist.control.hostport import HostPort

log = logging.getLogger("datadist.control")

REPORT_SECONDS = 10.0
"""Pause between two log lines about the same host."""
MAX_LINES = 16
"""Log lines in that time about hosts that nobody named."""
MAX_HOSTS = 64
MAX_EXPLAINED = 4
"""Hosts that nobody named, in the explanation of a link."""


class Refusals:
    """Why the last connection of each host was refused at one listener.

    ``expected(host)`` says whether a member is expected from there: what is told of such a host is not
    lost among strangers.
    """

    def __init__(self, endpoint: HostPort, expected: Callable[[str], bool]) -> None:
        self._endpoint = endpoint
        self._expected = expected
        self._reasons: OrderedDict[str, str] = OrderedDict()
        self._told: dict[str, float] = {}
        self._began = 0.0
        self._lines = 0
        self._silent = 0

    def note(self, host: str, reason: str) -> None:
        """A connection of that host was refused: remember it, and log it within limits."""
        self._reasons[host] = reason
        self._reasons.move_to_end(host)
        if len(self._reasons) > MAX_HOSTS:
            strangers = (each for each in self._reasons if not self._expected(each))
            del self._reasons[next(strangers, next(iter(self._reasons)))]
        if self._may_log(host):
            log.warning("refused a connection of %s at %s: %s", host, self._endpoint, reason)

    def forget(self, host: str) -> None:
        """An engine of that host came in."""
        self._reasons.pop(host, None)

    def explain(self) -> list[str]:
        """What was refused, for people: every expected host, and the last few of others."""
        named = [host for host in self._reasons if self._expected(host)]
        others = [host for host in self._reasons if host not in named]
        said = [
            f"refused {host} at {self._endpoint}: {self._reasons[host]}"
            for host in (*named, *others[-MAX_EXPLAINED:])
        ]
        more = len(others) - MAX_EXPLAINED
        return [*said, f"and {more} hosts more at {self._endpoint}"] if more > 0 else said

    def __getitem__(self, host: str) -> str:
        return self._reasons[host]

    def items(self) -> list[tuple[str, str]]:
        """Hosts and reasons."""
        return list(self._reasons.items())

    def _may_log(self, host: str) -> bool:
        now = time.monotonic()
        if now - self._began >= REPORT_SECONDS:
            self._begin(now)
        if now - self._told.get(host, -REPORT_SECONDS) < REPORT_SECONDS:
            return False
        if not self._expected(host):
            self._lines += 1
            if self._lines > MAX_LINES:
                self._silent += 1
                return False
        self._told[host] = now
        return True

    def _begin(self, now: float) -> None:
        if self._silent:
            log.warning(
                "refused %d connections more at %s, of other hosts", self._silent, self._endpoint
            )
        self._began, self._lines, self._silent = now, 0, 0
        self._told = {h: t for h, t in self._told.items() if now - t < REPORT_SECONDS}

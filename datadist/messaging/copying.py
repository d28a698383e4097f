"""Copies between messages and memory on the engine's thread, which other threads can forbid."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Copying"]

PAUSE_SECONDS = 0.0005


class Copying:
    """One copy at a time. It has no lock: who forbids copies waits only as long as it wants.

    A copy does not end while a page of memory does not come (userfaultfd, a file system that hangs).
    """

    def __init__(self) -> None:
        self.forbidden = False
        self.running = False

    def run(self, copy: Callable[[], None]) -> bool:
        """Copy, unless that was forbidden; whether it was not, also meanwhile. On the engine's thread."""
        self.running = True  # before the look at `forbidden`: see `wait`
        try:
            if self.forbidden:
                return False
            copy()
            return not self.forbidden
        finally:
            self.running = False

    def forbid(self) -> None:
        """No copy begins any more. From any thread, never blocks."""
        self.forbidden = True

    def wait(self, until: float) -> bool:
        """After :meth:`forbid`, wait for the last copy; False if it runs at ``until`` (monotonic)."""
        while self.running:
            if time.monotonic() >= until:
                return False
            time.sleep(PAUSE_SECONDS)
        return True

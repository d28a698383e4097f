"""Waiting for what becomes true."""

from __future__ import annotations

import time
from collections.abc import Callable

SECONDS = 60.0


def until(condition: Callable[[], bool], seconds: float = SECONDS, what: str = "") -> None:
    """Return once the condition holds; it fails after so many seconds, and ``what`` says of what."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)

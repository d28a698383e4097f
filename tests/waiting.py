"""Waiting for what becomes true."""

from __future__ import annotations

import time
from collections.abc import Callable

SECONDS = 60.0


def until(condition: Callable[[], bool], seconds: float = SECONDS, what: str = "") -> None:
    """Return once the condition holds; it fails after so many seconds, and ``what`` says of what."""
    assert comes_true(condition, seconds), what


def comes_true(condition: Callable[[], bool], seconds: float = SECONDS) -> bool:
    """Whether the condition holds at a moment of so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.001)
    return True

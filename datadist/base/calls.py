"""Calls that link or unlink, and calls that a signal handler interrupted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INSIDE = tuple(
    f"datadist.{room}." for room in ("engine", "transfers", "links", "caches", "transports")
)
"""The modules of an engine."""


class Calls:
    """The engine is taken apart only after these calls. Any thread; no locks, so signals are harmless."""

    def __init__(self) -> None:
        self._inside: list[None] = []
        """One item per call: appending and popping need no lock."""

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Note that a thread is inside a call."""
        self._inside.append(None)
        try:
            yield
        finally:
            self._inside.pop()

    def any(self) -> bool:
        """Whether some thread is inside a call."""
        return bool(self._inside)


def interrupted() -> bool:
    """Whether our caller was called from inside of an engine, as a signal handler may be.

    What such a call holds is let go only after the handler has returned.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(INSIDE):
            return True
        frame = frame.f_back
    return False

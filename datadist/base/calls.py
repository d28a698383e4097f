"""Calls that link or unlink."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


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

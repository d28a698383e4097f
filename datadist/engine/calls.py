"""Calls that link or unlink: which threads are inside one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Calls:
    """The engine is taken apart only after these calls. Any thread; no locks, so signals are harmless."""

    def __init__(self) -> None:
        self._threads: list[int] = []

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Note that this thread is inside a call."""
        own = threading.get_ident()
        self._threads.append(own)
        try:
            yield
        finally:
            self._threads.remove(own)

    def any(self) -> bool:
        """Whether some thread is inside a call."""
        return bool(self._threads)

    def of_this_thread(self) -> bool:
        """Whether we are in a signal handler that interrupted a call."""
        return threading.get_ident() in self._threads

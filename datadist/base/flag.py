"""An event that handlers of signals may wait for, set and leave at any moment.

`threading.Event` is Python code around a lock, which a handler that raises may leave taken, and which
one that waits would wait for itself.
"""

from __future__ import annotations

import threading

__all__ = ["Flag"]


class Flag:
    """Is set once and stays so. Any thread; no lock is held while Python code runs."""

    __slots__ = ("_set", "_waiting")

    def __init__(self) -> None:
        self._set = False
        self._waiting: set[threading.Lock] = set()
        """A taken lock per thread that waits."""

    def is_set(self) -> bool:
        """Whether it was set."""
        return self._set

    def set(self) -> None:
        """Wake all who wait, and keep nobody waiting from now on."""
        self._set = True
        for lock in tuple(self._waiting):
            try:  # not `suppress`: it is Python code, and takes longer than the rest
                lock.release()
            except RuntimeError:  # it was set twice
                continue

    def wait(self, timeout: float | None = None) -> bool:
        """Whether it is set, within ``timeout`` seconds."""
        if self._set:
            return True
        lock = threading.Lock()
        lock.acquire()
        try:
            self._waiting.add(lock)
            if not self._set:  # from here on it is seen by `set`
                lock.acquire(timeout=_seconds(timeout))
        finally:
            self._waiting.discard(lock)
        return self._set


def _seconds(timeout: float | None) -> float:
    return -1.0 if timeout is None else min(max(0.0, timeout), threading.TIMEOUT_MAX)

"""What the thread of a device sets and a transfer waits for; handlers of signals may raise in any of it.

`threading.Event` is Python code around a lock. A handler that raises may leave that taken, and the
thread of the device, which serves all links, would wait for it for ever.
"""

from __future__ import annotations

import contextlib
import threading

__all__ = ["Notification"]


class Notification:
    """Set by any thread, for the one that waits; each step is one call of C."""

    def __init__(self) -> None:
        self._unset = threading.Lock()
        """Taken while it is not set."""
        self._unset.acquire()

    def is_set(self) -> bool:
        """Whether the next :meth:`wait` returns at once."""
        return not self._unset.locked()

    def set(self) -> None:
        """Wake who waits, or who waits next."""
        with contextlib.suppress(RuntimeError):  # it was set
            self._unset.release()

    def clear(self) -> None:
        """Whoever waits from now on waits for the next :meth:`set`."""
        self._unset.acquire(blocking=False)

    def wait(self, timeout: float) -> bool:
        """Whether it was set within ``timeout`` seconds; clears it."""
        return self._unset.acquire(timeout=min(max(0.0, timeout), threading.TIMEOUT_MAX))

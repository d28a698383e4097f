"""Names of communicators. HCCL permits one communicator per name, process and device."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

POLL_SECONDS = 0.05

_changed = threading.Condition()
_taken: set[tuple[int, str]] = set()


def take(device: int, name: str, deadline: float, unwanted: Callable[[], bool]) -> bool:
    """Take a name; waits until an earlier communicator that is being destroyed gives it back.

    False at the deadline (``time.monotonic()``), or when it is ``unwanted`` meanwhile.
    """
    with _changed:
        while (device, name) in _taken:
            left = deadline - time.monotonic()
            if left <= 0 or unwanted():
                return False
            _changed.wait(min(left, POLL_SECONDS))
        _taken.add((device, name))
        return True


def give_back(device: int, name: str) -> None:
    """Undo :func:`take`; harmless when the name was not taken."""
    with _changed:
        _taken.discard((device, name))
        _changed.notify_all()

"""How to wait for UCX, which has to be looked at and has no descriptor here."""

from __future__ import annotations

import os
import time

PAUSES = ((0.02, 0.0), (0.5, 0.0001), (float("inf"), 0.001))
"""Pause between two looks by the time since the last event. A piece takes some milliseconds on a fast
network: until then a pause would let the buffers of its sockets run full. Others get the processor."""
SPIN_SECONDS = 0.0002


def pause(idle: float) -> None:
    """Sleep as befits the time since something has happened."""
    seconds = next(each for limit, each in PAUSES if idle < limit)
    if seconds:
        time.sleep(seconds)
    elif idle > SPIN_SECONDS:
        os.sched_yield()

"""How to wait for UCX, which has to be looked at and has no descriptor here."""

from __future__ import annotations

import time

PAUSES = ((0.02, 0.0), (0.5, 0.0001), (5.0, 0.001), (60.0, 0.01), (float("inf"), 0.1))
"""Pause between two looks by the time since the last event. A piece takes some milliseconds on a fast
network: until then a pause would let the buffers of its sockets run full. A peer that says nothing for
seconds is on a slow network, is stopped, or never says anything: that must not keep a processor awake."""
FIRST, FIRST_PAUSE = (0.0001, 0.0004), 0.00005
"""When, and how long, a caller pauses before the first answer: its owner may have been asleep, and wait
for the very processor on which the caller spins."""


def pause_after(idle: float, first: bool = False) -> float:
    """Seconds to wait by the time since something has happened; ``first``: before the first event."""
    if first and FIRST[0] <= idle < FIRST[1]:
        return FIRST_PAUSE
    return next(each for limit, each in PAUSES if idle < limit)


def pause(idle: float, first: bool, most: float) -> None:
    """Sleep so long, and not longer than ``most``."""
    seconds = min(pause_after(idle, first), most)
    if seconds > 0:
        time.sleep(seconds)

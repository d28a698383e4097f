"""How to wait for UCX, which has to be looked at and has no descriptor here."""

from __future__ import annotations

import time

PAUSES = ((0.02, 0.0), (0.5, 0.0001), (float("inf"), 0.001))
"""Pause between two looks by the time since the last event. A piece takes some milliseconds on a fast
network: until then a pause would let the buffers of its sockets run full."""
FIRST, FIRST_PAUSE = (0.0001, 0.0004), 0.00005
"""When, and how long, a caller pauses before the first answer: its owner may have been asleep, and wait
for the very processor on which the caller spins."""


def pause(idle: float, first: bool = False) -> None:
    """Sleep as befits the time since something has happened; ``first``: before the first event."""
    if first and FIRST[0] <= idle < FIRST[1]:
        time.sleep(FIRST_PAUSE)
        return
    seconds = next(each for limit, each in PAUSES if idle < limit)
    if seconds:
        time.sleep(seconds)

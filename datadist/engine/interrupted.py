"""Whether a call was interrupted by a signal handler, which calls us now."""

from __future__ import annotations

import sys
from types import FrameType

INSIDE = tuple(
    f"datadist.{name}." for name in ("engine", "transfers", "links", "caches", "transports")
)
"""The packages of an engine."""


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

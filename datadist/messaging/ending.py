"""How a session ends."""

from __future__ import annotations

from enum import Enum

__all__ = ["End"]


class End(Enum):
    """How a session ends: what the peer learns, and what is known of it."""

    TOLD = "told"
    """We end it, and tell the peer."""
    UNHEARD = "unheard"
    """The peer does not answer, or core has lost it; it is told, and may hear that when it goes on."""
    CUT = "cut"
    """The connection is lost; the peer may live, and may have messages of ours before it."""
    GONE = "gone"
    """The peer's process or engine has ended: it touches no memory any more."""

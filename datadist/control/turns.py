"""How much of the control thread one session gets: a share of each turn, and half of its time at most."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

SHARE_FRAMES = 64
SHARE_BYTES = 1 << 18
SHARE_SECONDS = 0.002
"""What one session may have of one turn; the frame that exceeds it is handled to its end."""
CREDIT_SECONDS = 1.0
"""Processor time that a silent session may have at once; a directory of 65,536 keys takes 0.6."""
CREDIT_RATE = 0.5
"""Processor seconds that a session earns per second."""


@dataclass
class Share:
    """What is left of one turn."""

    frames: int = SHARE_FRAMES
    nbytes: int = SHARE_BYTES
    began: float = field(default_factory=time.thread_time)

    @property
    def spent(self) -> float:
        """Processor seconds since it began."""
        return time.thread_time() - self.began

    @property
    def over(self) -> bool:
        """Whether the next session has its turn."""
        return self.frames <= 0 or self.nbytes <= 0 or self.spent > SHARE_SECONDS


class Credit:
    """Processor time of one session. Not what passes on the clock: that is others' as well."""

    def __init__(self) -> None:
        self._left = CREDIT_SECONDS
        self._at = time.monotonic()

    def spend(self, seconds: float) -> float:
        """Take what a share has cost; how many seconds the session has to rest for that."""
        now = time.monotonic()
        earned = (now - self._at) * CREDIT_RATE
        self._left, self._at = min(CREDIT_SECONDS, self._left + earned) - seconds, now
        return max(0.0, -self._left / CREDIT_RATE)

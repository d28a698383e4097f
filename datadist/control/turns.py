"""How much of the control thread one peer gets: a share of each turn, and few long ones."""

from __future__ import annotations

import time
from collections import OrderedDict

SHARE_FRAMES = 64
SHARE_BYTES = 1 << 18
SHARE_SECONDS = 0.0005
"""What one session may have of one turn; the frame that exceeds it is handled to its end."""
CREDIT_SECONDS = 0.25
"""Processor time that a silent peer may have at once; a directory of 20,000 keys takes it."""
CREDIT_RATE = 0.1
"""Processor seconds of that which a peer earns per second."""
MEAN_WAIT_SECONDS = 0.002
"""How long others wait for a peer without credit on average, whenever they come."""
MAX_REST_SECONDS = 2.0
"""Longest rest of a peer without credit, unless twice what it has had is longer."""
MAX_ORIGINS = 256
"""Peers whose credit is remembered after their sessions."""


class Share:
    """What is left of one turn."""

    __slots__ = ("_began_at", "_processor_began", "frames", "nbytes")

    def __init__(self) -> None:
        self.frames = SHARE_FRAMES
        self.nbytes = SHARE_BYTES
        self._processor_began = time.thread_time()
        self._began_at = time.monotonic()

    @property
    def spent(self) -> float:
        """Processor seconds since it began."""
        return time.thread_time() - self._processor_began

    @property
    def over(self) -> bool:
        """Whether the next session has its turn.

        The processor's time is a system call; it cannot be more than what has passed on the clock.
        """
        if self.frames <= 0 or self.nbytes <= 0:
            return True
        return time.monotonic() - self._began_at > SHARE_SECONDS and self.spent > SHARE_SECONDS


class Credit:
    """Processor time that may be had without a rest. What passes on the clock is others' as well.

    Sessions of one origin that are without credit rest one after another: ``rests_until`` is theirs.
    """

    def __init__(self, left: float | None = None, rests_until: list[float] | None = None) -> None:
        self._left = CREDIT_SECONDS if left is None else left
        self._at = time.monotonic()
        self._rests_until = [0.0] if rests_until is None else rests_until

    def earn(self) -> float:
        """What is there by now."""
        now = time.monotonic()
        self._left = min(CREDIT_SECONDS, self._left + (now - self._at) * CREDIT_RATE)
        self._at = now
        return self._left

    def begin(self) -> Credit:
        """One for a newcomer of the same origin, who takes all that is there."""
        left, self._left = self.earn(), 0.0
        return Credit(left, self._rests_until)

    def spend(self, seconds: float) -> float:
        """Take what a share has cost; how many seconds the session has to rest for that.

        Without credit an origin has a third of the time, and less where its shares are long. Who comes
        at any moment waits on average for a share squared, by twice the time from one share to the next.
        """
        if self.earn() >= seconds:
            self._left -= seconds
            return 0.0
        self._left = 0.0
        rest = max(2 * seconds, min(MAX_REST_SECONDS, seconds * seconds / (2 * MEAN_WAIT_SECONDS)))
        self._rests_until[0] = max(self._at, self._rests_until[0]) + rest
        return self._rests_until[0] - self._at


class Credits:
    """Those of peers: who comes again has no more than who stays."""

    def __init__(self) -> None:
        self._by_origin: OrderedDict[int | str, Credit] = OrderedDict()

    def of(self, pid: int | None, host: str | None) -> Credit:
        """For a session: that of its process; over the network what its host has left.

        A host may have many engines, which do not share what they earn later.
        """
        origin = pid or host
        if origin is None or origin == "":
            return Credit()
        credit = self._by_origin.setdefault(origin, Credit())
        self._by_origin.move_to_end(origin)
        if len(self._by_origin) > MAX_ORIGINS:
            self._by_origin.popitem(last=False)
        return credit if pid else credit.begin()

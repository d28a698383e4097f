"""How long one call that transfers may take, and whether its user has given it up."""

from __future__ import annotations

from time import monotonic

from datadist.base.texts import in_seconds
from datadist.caches.peers import PeerView

__all__ = ["CallLimit"]


class CallLimit:
    """The time limit of one call: the caller's, else ``sync_kv_timeout``.

    It is made where arguments are checked. Its time starts with :meth:`begin`, when the transfer does.
    """

    __slots__ = ("_named", "began", "cancelled", "deadline", "in_pieces", "peer", "seconds")

    def __init__(self, seconds: float | None = None) -> None:
        self._named = seconds is not None
        self.seconds = 0.0 if seconds is None else seconds
        """Of the whole call; 0 until it begins where the caller named none."""
        self.began = 0.0
        """By time.monotonic; 0 before."""
        self.deadline = 0.0
        self.in_pieces = False
        """Whether a large transfer moves in pieces even where nobody waits, so that it can be ended."""
        self.cancelled = False
        """Whether the user has given it up: it ends before its next piece."""

        self.peer: PeerView | None = None
        """Whom the transfer was with, once it has ended well."""

    def begin(self, seconds: float) -> CallLimit:
        """Start the time, once; ``seconds`` where the caller named none. Returns itself."""
        if not self.began:
            if not self._named:
                self.seconds = seconds
            self.began = monotonic()
            self.deadline = self.began + self.seconds
        return self

    @property
    def left(self) -> float:
        """Seconds until the deadline, never negative."""
        return max(0.0, self.deadline - monotonic())

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return monotonic() - self.began

    def __str__(self) -> str:
        name = "timeout_in_millis" if self._named else "sync_kv_timeout"
        return f"{name} ({in_seconds(self.seconds)})"

"""Remembers cases, for messages that are logged only once per case."""

from __future__ import annotations

from collections.abc import Hashable

__all__ = ["SeenCases"]


class SeenCases:
    """Tells whether a case is new. Thread-safe without a lock.

    At most ``most`` cases are remembered. Then all are forgotten and count as new again.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._seen: dict[Hashable, object] = {}

    def is_new(self, case: Hashable) -> bool:
        """Whether this is the first call for this case."""
        if case in self._seen:
            return False
        if len(self._seen) >= self._most:
            self._seen.clear()
        mine = object()
        return self._seen.setdefault(case, mine) is mine  # atomic: only one thread gets True

    def __len__(self) -> int:
        """How many cases are remembered."""
        return len(self._seen)

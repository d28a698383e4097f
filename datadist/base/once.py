"""What is said once, though it happens again and again."""

from __future__ import annotations

from collections.abc import Hashable

__all__ = ["Once"]


class Once:
    """Tells whether a case is new. Any thread; takes no lock.

    ``most`` cases are remembered. After that many all are forgotten, and may be new again.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._seen: dict[Hashable, object] = {}

    def is_new(self, case: Hashable) -> bool:
        """Whether nobody has asked for this case before."""
        if case in self._seen:
            return False
        if len(self._seen) >= self._most:
            self._seen.clear()
        mine = object()
        return self._seen.setdefault(case, mine) is mine  # atomic: one thread is the first

    def __len__(self) -> int:
        """How many cases are remembered."""
        return len(self._seen)

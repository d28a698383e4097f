"""A set of integers stored as ranges; the cost does not depend on the lengths of the ranges."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

__all__ = ["RangeSet"]


class RangeSet:
    """A union of ranges of integers."""

    def __init__(self) -> None:
        self._bounds: list[int] = []
        """Start and stop of each range, ascending; ranges that touch are one."""

    def add(self, start: int, stop: int) -> None:
        """Add ``[start, stop)``; an empty range adds nothing."""
        if start >= stop:
            return
        low, high = bisect_left(self._bounds, start), bisect_right(self._bounds, stop)
        begins = [start] if low % 2 == 0 else []
        ends = [stop] if high % 2 == 0 else []
        self._bounds[low:high] = begins + ends

    def is_all(self, count: int) -> bool:
        """Whether the set is exactly ``[0, count)``."""
        return self._bounds == [0, count]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Start and stop of each range, ascending."""
        return list(zip(self._bounds[::2], self._bounds[1::2], strict=True))

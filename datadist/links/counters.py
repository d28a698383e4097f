"""What went over each link: operations, bytes, errors and seconds, by direction."""

from __future__ import annotations


class Tally:
    """Counts of one direction. An operation that failed counts no bytes.

    All are bound in one step: a handler of a signal finds an operation counted wholly or not at all.
    """

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts = 0, 0, 0, 0.0

    def add(self, nbytes: int, seconds: float) -> None:
        """Count an operation that went well."""
        operations, moved, errors, took = self._counts
        self._counts = operations + 1, moved + nbytes, errors, took + seconds

    def add_error(self, seconds: float) -> None:
        """Count one that failed."""
        operations, moved, errors, took = self._counts
        self._counts = operations, moved, errors + 1, took + seconds

    def as_dict(self) -> dict[str, int | float]:
        """Plain numbers."""
        operations, moved, errors, seconds = self._counts
        return {"operations": operations, "bytes": moved, "errors": errors, "seconds": seconds}


class Counters:
    """Both directions of one link to one peer, or of an engine: what *we* began."""

    __slots__ = ("pull", "push")

    def __init__(self) -> None:
        self.pull = Tally()
        self.push = Tally()

    def as_dict(self) -> dict[str, dict[str, int | float]]:
        """Plain numbers."""
        return {"pull": self.pull.as_dict(), "push": self.push.as_dict()}

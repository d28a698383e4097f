"""What went over each link: operations, bytes, errors and seconds, by direction."""

from __future__ import annotations


class Tally:
    """Counts of one direction. An operation that failed counts no bytes."""

    __slots__ = ("bytes", "errors", "operations", "seconds")

    def __init__(self) -> None:
        self.operations = 0
        self.bytes = 0
        self.errors = 0
        self.seconds = 0.0

    def add(self, nbytes: int, seconds: float) -> None:
        """Count an operation that went well."""
        self.operations += 1
        self.bytes += nbytes
        self.seconds += seconds

    def as_dict(self) -> dict[str, int | float]:
        """Plain numbers."""
        return {
            "operations": self.operations,
            "bytes": self.bytes,
            "errors": self.errors,
            "seconds": self.seconds,
        }


class Counters:
    """Both directions of one link to one peer, or of an engine: what *we* began."""

    __slots__ = ("pull", "push")

    def __init__(self) -> None:
        self.pull = Tally()
        self.push = Tally()

    def as_dict(self) -> dict[str, dict[str, int | float]]:
        """Plain numbers."""
        return {"pull": self.pull.as_dict(), "push": self.push.as_dict()}

"""Large messages that were sent, to be filled again: fresh memory costs more than the copy into it."""

from __future__ import annotations

from datadist.messaging.pieces import LARGE

__all__ = ["SpareMessages"]


class SpareMessages:
    """At most ``most``; on the engine's thread."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._spare: list[bytearray] = []

    def take(self, size: int) -> bytearray:
        """A message of that size, with any content."""
        for at, message in enumerate(self._spare):
            if len(message) == size:
                return self._spare.pop(at)
        return bytearray(size)

    def give(self, message: bytearray) -> None:
        """The engine is done with it."""
        if len(message) >= LARGE:
            self._spare = [*self._spare, message][-self._most :]

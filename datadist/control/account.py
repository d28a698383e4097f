"""What one peer may have of this engine: an account for each session, with a limit on everything in it.

The limits are by memory: what an item costs here as an object is said with each. They are above what an
honest peer can need, since an engine refuses to its own user what would exceed them at its peers (see
:class:`~datadist.caches.owned.OwnDirectory`). What exceeds one ends the session, and no other.
"""

from __future__ import annotations

import threading
from enum import Enum

from datadist.base.picklable import PicklableError

__all__ = [
    "MAX_CACHES",
    "MAX_KEYS",
    "MAX_TABLES",
    "MAX_TENSORS",
    "Account",
    "Item",
    "LimitExceeded",
]

MAX_CACHES = 1 << 17
"""Caches of one engine: 1.8 KB each at every peer, 230 MB in all."""
MAX_KEYS = 1 << 17
"""Keys of all its caches: 1.5 KB each, 200 MB in all."""
MAX_TENSORS = 1 << 20
"""Tensors of all its caches: 80 bytes each with their regions, 84 MB in all."""
MAX_TABLES = 32 << 20
"""Characters of the rank tables of all its links."""
SLACK = 1 << 10
"""By how much a peer may exceed what its own engine permits it."""


class Item(Enum):
    """What is counted: in words, and the most that one peer may have at one time."""

    CACHES = "caches", MAX_CACHES + SLACK
    KEYS = "keys", MAX_KEYS + SLACK
    TENSORS = "tensors", MAX_TENSORS + SLACK
    WISHES = "links that it waits for", 1024
    WISH_CHARACTERS = "characters of links that it waits for", 2 * MAX_TABLES
    OFFERS = "offers that are not taken yet", 128
    """An honest peer has 8 at most, of 16 descriptors each."""
    OFFER_BYTES = "bytes of offers that are not taken yet", 256 << 20
    ENDING = "links that are not closed yet", 64
    REQUESTS = "requests that are not answered yet", 4096
    NOTICES = "messages that the program has not taken", 128
    """An honest peer has 64, and one more for each thread whose call was interrupted."""
    NOTICES_WITHOUT_CREDIT = "messages sent without a credit", 0
    REQUEST_BYTES = "bytes of requests that are not answered yet", 128 << 20

    def __init__(self, words: str, limit: int) -> None:
        self.words = words
        self.limit = limit

    __hash__ = object.__hash__  # that of `Enum` is Python code


class LimitExceeded(PicklableError):
    """A peer would have more of an item than it may; the text says of what, how many and the limit."""

    def __init__(self, item: Item, count: int) -> None:
        super().__init__(f"it has {count} {item.words}, more than {item.limit}")


class Account:
    """Counts by item. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(Item, 0)

    def take(self, item: Item, count: int = 1) -> None:
        """Count some more. Raises :class:`LimitExceeded`, and counts nothing then."""
        with self._lock:
            total = self._counts[item] + count
            if total > item.limit:
                raise LimitExceeded(item, total)
            self._counts[item] = total

    def give_back(self, item: Item, count: int = 1) -> None:
        """Count some less; none is less than nothing."""
        with self._lock:
            self._counts[item] = max(0, self._counts[item] - count)

    def check(self, item: Item, total: int) -> None:
        """Raise :class:`LimitExceeded` where somebody else counts, and has come to that many."""
        if total > item.limit:
            raise LimitExceeded(item, total)

    def __getitem__(self, item: Item) -> int:
        return self._counts[item]

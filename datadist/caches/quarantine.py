"""Local memory that transfers may still touch although their calls have ended.

A transport may be unable to stop a transfer (``in_flight`` of its error): its peer is stopped, or a
page does not come. The call ends by its deadline all the same; the ranges of our memory that it named
are kept here until the transport says that it has settled. Pages of a pool are not given to another
cache before that, and registered memory cannot be unregistered.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from datadist.caches.block_ranges import BlockRanges
from datadist.transport import InFlight
from datadist.transports.defects import text_of

log = logging.getLogger("datadist.transfer")


@dataclass(eq=False)
class Kept:
    """What one transfer may still touch."""

    flight: InFlight
    addresses: Sequence[int]
    lengths: Sequence[int]
    owner: object
    """The attempt over whose link it goes."""
    rank: int
    """The peer's."""
    text: str
    """What it is, for people."""
    since: float = field(default_factory=time.monotonic)
    release: Callable[[], None] = lambda: None
    calls: list[Callable[[], None]] = field(default_factory=list)
    """Made once it has settled."""

    def settled(self) -> bool:
        """Whether it touches nothing any more. A transport that raises has not said so."""
        try:
            return self.flight.settled()
        except Exception as error:
            text_of(error, self.flight)
            return False

    def touches(self, ranges: BlockRanges) -> bool:
        """Whether it may touch one of these ranges."""
        return ranges.touch_any(self.addresses, self.lengths)

    def __str__(self) -> str:
        first, nbytes = min(self.addresses), sum(self.lengths)
        return f"{self.text} has not let go of {nbytes} bytes of our memory, from {first:#x} on"


class Quarantine:
    """All that is kept; every method works from any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._kept: tuple[Kept, ...] = ()
        self.on_kept: Callable[[Kept], None] = lambda _: None
        """Called when something is kept: it has :meth:`release_settled` called until that is False."""

    def keep(self, kept: Kept) -> None:
        """Take in what has just been left; before anybody can free the memory."""
        with self._lock:
            if kept not in self._kept:
                self._kept = (*self._kept, kept)
        log.warning("%s: it is kept until then", kept)
        self.on_kept(kept)

    def release_settled(self) -> bool:
        """Let go of what has settled; whether anything is left.

        On one thread, where no handler of a signal runs: what waits for it is told once.
        """
        with self._lock:
            settled = [kept for kept in self._kept if kept.settled()]
            self._kept = tuple(kept for kept in self._kept if kept not in settled)
        for kept in settled:
            log.info("%s has settled", kept.text)
            kept.release()
            for call in kept.calls:
                call()
        return bool(self._kept)

    def holds(self, kept: Kept) -> bool:
        """Whether that has not settled."""
        return kept in self._kept and not kept.settled()

    def of(self, owner: object) -> list[Kept]:
        """What has not settled of one link."""
        return [kept for kept in self._kept if kept.owner is owner and not kept.settled()]

    def touching(self, ranges: BlockRanges) -> Kept | None:
        """What may still touch one of these ranges."""
        return next(
            (kept for kept in self._kept if kept.touches(ranges) and not kept.settled()), None
        )

    def defers(self, ranges: BlockRanges, call: Callable[[], None]) -> bool:
        """Whether these ranges are kept: then ``call`` is made once they may be free."""
        if not self._kept:
            return False
        with self._lock:
            for kept in self._kept:
                if kept.touches(ranges):
                    kept.calls.append(call)
                    return True
        return False

    def texts(self, owner: object = None) -> list[str]:
        """What is kept (of one link), for people."""
        return [
            str(kept)
            for kept in self._kept
            if (owner is None or kept.owner is owner) and not kept.settled()
        ]

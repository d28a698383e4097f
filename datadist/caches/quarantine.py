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
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from datadist.transport import InFlight
from datadist.transports.defects import text_of

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger("datadist.transfer")


class Ranges:
    """Ranges of memory, merged: a question takes the logarithm of their number."""

    def __init__(self, addresses: Buffer, lengths: Buffer) -> None:
        """Int64 vectors of equal item count n >= 1, as :meth:`Link.read` gets them."""
        begins, sizes = np.array(addresses, np.int64), np.array(lengths, np.int64)
        order = np.argsort(begins)
        begins = begins[order]
        ends = np.maximum.accumulate(begins + sizes[order])
        apart = begins[1:] > ends[:-1]
        self._begins = begins[np.concatenate(([True], apart))]
        self._ends = ends[np.concatenate((apart, [True]))]
        self.nbytes = int(sizes.sum())

    @property
    def first(self) -> int:
        """The lowest address."""
        return int(self._begins[0])

    def meet(self, bases: Sequence[int], size: int) -> bool:
        """Whether one of them overlaps one of the ranges of ``size`` bytes at ``bases``."""
        where: npt.NDArray[np.int64] = np.array(bases, np.int64)
        next_ones = np.searchsorted(self._ends, where, side="right")
        known = next_ones < len(self._ends)
        return bool((self._begins[next_ones[known]] < where[known] + size).any())


@dataclass(eq=False)
class Kept:
    """What one transfer may still touch."""

    flight: InFlight
    ranges: Ranges
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

    def __str__(self) -> str:
        ranges = self.ranges
        return (
            f"{self.text} has not let go of {ranges.nbytes} bytes of our memory, "
            f"from {ranges.first:#x} on"
        )


class Quarantine:
    """All that is kept; every method works from any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._kept: tuple[Kept, ...] = ()
        self.on_kept: Callable[[Kept], None] = lambda _: None
        """Called when something is kept: it has :meth:`release_settled` called until that is False."""

    def keep(self, kept: Kept) -> None:
        """Take in what has just been left, once; before anybody can free the memory."""
        with self._lock:
            if self.knows(kept.flight):
                return
            self._kept = (*self._kept, kept)
        log.warning("%s: it is kept until then", kept)
        self.on_kept(kept)

    def knows(self, flight: InFlight) -> bool:
        """Whether something is kept for this transfer."""
        return any(flight is kept.flight for kept in self._kept)

    def release_settled(self) -> bool:
        """Let go of what has settled; whether anything is left.

        On one thread, where no handler of a signal runs: what waits for it is told once.
        """
        with self._lock:
            settled = [kept for kept in self._kept if kept.settled()]
            self._kept = tuple(kept for kept in self._kept if kept not in settled)
        for kept in settled:
            log.info("%s has settled", kept.text)
            for call in (kept.release, *kept.calls):
                _guarded(call)
        return bool(self._kept)

    def holds(self, kept: Kept) -> bool:
        """Whether that has not settled."""
        return kept in self._kept and not kept.settled()

    def of(self, owner: object) -> list[Kept]:
        """What has not settled of one link."""
        return [kept for kept in self._kept if kept.owner is owner and not kept.settled()]

    def touching(self, bases: Sequence[int], size: int) -> Kept | None:
        """What may still touch one of the ranges of ``size`` bytes at ``bases``."""
        return next(
            (kept for kept in self._kept if kept.ranges.meet(bases, size) and not kept.settled()),
            None,
        )

    def defers(self, bases: Sequence[int], size: int, call: Callable[[], None]) -> bool:
        """Whether these ranges are kept: then ``call`` is made once they may be free."""
        if not self._kept:
            return False
        with self._lock:
            for kept in self._kept:
                if kept.ranges.meet(bases, size):
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


def _guarded(call: Callable[[], None]) -> None:
    """Others wait for their calls too, whatever this one raises."""
    try:
        call()
    except Exception:
        log.exception("unexpected error after a transfer had settled; please report it")

"""How many transfers go on at a time over one link and rank (:attr:`Capabilities.parallel`)."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import islice
from queue import Empty, SimpleQueue
from time import monotonic

from datadist.base.callers import pass_on

__all__ = ["MAX_PERMITS", "NON_BLOCKING", "NOT_FREE", "Permits"]

MAX_PERMITS = 256
"""Core never has more transfers in flight per link and rank, whatever a transport declares."""
WAITING, NON_BLOCKING = (True,), (False,)
"""For `map` over :attr:`Permits.take_now`: with waiting, or once without."""
NOT_FREE = Empty
"""What :attr:`Permits.take_now` raises where no permit is free."""
LOOK_SECONDS = 0.05
"""A waiter looks so often whether it is the first one, if an exception kept the one before it from
telling."""

_arrivals = itertools.count()


class Permits:
    """``count`` permits; those who wait get them in the order in which they came.

    The free ones are in a queue that is written in C, of which one call takes or gives back one. What
    is taken by ``taken += map(permits.take_now, NON_BLOCKING)`` is noted before a handler of a signal
    can run: it is lost to nobody, wherever that raises.
    """

    __slots__ = ("_free", "count", "line", "release", "take_now")

    def __init__(self, count: int = 1) -> None:
        self.count = min(count, MAX_PERMITS)
        self._free: SimpleQueue[bool] = SimpleQueue()
        for _ in range(self.count):
            self._free.put(True)
        self.line: dict[int, threading.Lock] = {}
        """A taken lock of each waiter, by arrival. Newcomers take nothing while one is here."""
        self.take_now: Callable[..., bool] = self._free.get
        """Take one, without regard to who waits; raises :data:`NOT_FREE`. Written in C."""
        self.release: Callable[[], None] = partial(self._free.put, True)
        """Give one back. Written in C."""

    @property
    def free(self) -> int:
        """How many can be taken now."""
        return self._free.qsize()

    @property
    def taken(self) -> int:
        """How many are not free."""
        return self.count - self._free.qsize()

    def take(self, taken: list[bool], timeout: float) -> None:
        """Take one permit within ``timeout`` seconds; then there is one more True in ``taken``."""
        if not self.line:
            try:
                taken += map(self.take_now, NON_BLOCKING)
                return
            except NOT_FREE as error:
                pass_on(error)
        self._wait(taken, monotonic() + timeout)

    def give_back(self, taken: list[bool]) -> None:
        """Give back the last one of ``taken``, which is not in there any more then; in one step of C."""
        deque(map(self._free.put, islice(iter(taken.pop, None), 1)), maxlen=0)

    def take_all(self, taken: list[bool], deadline: float) -> None:
        """Take those that are not in ``taken`` yet, as far as they are free by ``deadline``."""
        before = -1
        while before < len(taken) < self.count:
            before = len(taken)
            self.take(taken, max(0.0, deadline - monotonic()))

    def _wait(self, taken: list[bool], deadline: float) -> None:
        """The first in the line waits for a permit, the others to be the first."""
        arrival, bell = next(_arrivals), threading.Lock()
        bell.acquire()
        try:
            self.line[arrival] = bell
            while min(self.line) != arrival and (left := deadline - monotonic()) > 0:
                bell.acquire(timeout=min(left, LOOK_SECONDS))
            with suppress(NOT_FREE):
                taken += map(self.take_now, WAITING, (max(0.0, deadline - monotonic()),))
        finally:
            self.line.pop(arrival, None)
            for _, first in sorted(self.line.items())[:1]:
                with suppress(RuntimeError):  # it was told before
                    first.release()

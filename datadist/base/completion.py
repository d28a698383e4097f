"""The end of something that goes on by itself: whether it has come, and who is told of it."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable

from datadist.base.callers import pass_on
from datadist.base.flag import Flag

__all__ = ["Completion"]

log = logging.getLogger("datadist.transfer")


class Completion:
    """Comes once. Any thread; no lock. In a forked child, where nothing goes on, it has come."""

    __slots__ = ("_calls", "_done", "_pid")

    def __init__(self) -> None:
        self._done = Flag()
        self._calls: deque[Callable[[], object]] = deque()
        self._pid = os.getpid()

    @property
    def forked(self) -> bool:
        """Whether it did not come before this process was forked, where it never will."""
        return not self._done.is_set() and os.getpid() != self._pid

    def has_come(self) -> bool:
        """Whether it has come."""
        return self._done.is_set() or self.forked

    def wait(self, timeout: float | None) -> bool:
        """Whether it has come, within ``timeout`` seconds."""
        return self.forked or self._done.wait(timeout)

    def come(self) -> None:
        """It has: wake those who wait, then make the calls of those who want to be told, in order.

        An exception that a call raises is logged: it concerns none of the others. What a handler of a
        signal raises passes, and what ends a thread (``SystemExit``); :meth:`come_apart` makes the calls
        that are left then.
        """
        self._done.set()
        self._tell()

    def come_apart(self) -> None:
        """:meth:`come` on a thread of ours, which no call ends. May be repeated."""
        while True:
            try:
                self.come()
                return
            except BaseException:
                log.exception("a callback of a task raised")

    def tell(self, call: Callable[[], object]) -> None:
        """Make a call once it has come, on the thread that it comes on; here and now if it has.

        A forked child makes its own calls only: the others are the parent's.
        """
        if self.forked:
            self._calls.clear()
        self._calls.append(call)
        if self.has_come():
            self._tell()

    def _tell(self) -> None:
        while self._calls:
            try:
                call = self._calls.popleft()
            except IndexError as error:  # another thread makes it
                pass_on(error)
                return
            try:
                call()
            except Exception as error:
                pass_on(error)
                log.exception("a callback of a task raised")

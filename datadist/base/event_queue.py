"""Events for a program, which it takes in one call and may watch for through a descriptor."""

from __future__ import annotations

import errno
import os
from collections import deque
from contextlib import suppress
from itertools import repeat, starmap
from typing import Generic, TypeVar

from datadist.base.callers import pass_on

__all__ = ["EventQueue"]

Event = TypeVar("Event")


class EventQueue(Generic[Event]):
    """Any thread puts and takes; no lock. The owner of the queue limits what is put.

    The descriptor is readable while something may be there: a program takes what there is when it is
    readable, and finds nothing now and then.
    """

    __slots__ = ("_events", "_fds", "closed")

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._fds: list[int] = []
        """The descriptor is the first one; threads that ask for it at the same time may make more."""
        self.closed = False
        """Whether :meth:`close` was called."""

    def __len__(self) -> int:
        """How many wait."""
        return len(self._events)

    def put(self, event: Event) -> None:
        """Add an event, and make the descriptor readable if there is one."""
        self._events.append(event)
        self._signal()

    def _signal(self) -> None:
        for fd in self._fds[:1]:
            with suppress(OSError):  # its counter is full: it is readable
                os.eventfd_write(fd, 1)

    def take(self) -> list[Event]:
        """All events that wait, oldest first; none are left. Where it is interrupted, all are."""
        taken: list[Event] = []
        try:
            self.take_into(taken)
            return taken
        except BaseException:
            self.put_back(taken)
            raise

    def take_into(self, taken: list[Event]) -> None:
        """:meth:`take` into an empty list of the caller, who puts back what it has got if interrupted."""
        for fd in self._fds[:1]:
            with suppress(OSError):  # it was not readable
                os.eventfd_read(fd)
        try:
            # in C, without a look at the events: no handler of a signal comes between
            taken += starmap(self._events.popleft, repeat(()))
        except IndexError as error:
            pass_on(error)

    def put_back(self, taken: list[Event]) -> None:
        """Undo :meth:`take_into`, before what came meanwhile; the list is empty then."""
        self._events.extendleft(reversed(taken))
        taken.clear()
        self._signal()

    def waiting(self) -> list[Event]:
        """A copy of all events that wait."""
        return list(self._events)

    def fileno(self) -> int:
        """The descriptor, which is made by the first call.

        Raises ``OSError`` where none can be made, and after :meth:`close`.

        It belongs to the queue: the program must not close it.
        """
        if self.closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if not self._fds:
            # in C: what was made is noted
            self._fds += map(os.eventfd, (0,), (os.EFD_NONBLOCK | os.EFD_CLOEXEC,))
            if self._events:
                self._signal()
        return self._fds[0]

    def close(self) -> None:
        """Close the descriptor; events that wait can still be taken. Idempotent."""
        self.closed = True
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)

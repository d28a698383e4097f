"""State that one thread at a time changes, whatever Python runs in between.

A signal handler, or a ``__del__``, runs on a thread that may be in the middle of a change: waiting for
its lock would never end, and a second change inside of the first would tear the state.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import TypeVar

__all__ = ["NON_BLOCKING", "ROUNDS", "Exclusive"]

T = TypeVar("T")

ROUNDS = 2
"""So often a thread looks again for changes of others, who may ask for more without end."""
WAITING, NON_BLOCKING = (True,), (False,)
"""For `map` over a lock's ``acquire``, which is noted in C: no signal handler runs in between."""


class Exclusive:
    """A lock whose holder also makes the changes that its own thread was asked for meanwhile.

    An exception may end a change anywhere. Changes of :meth:`do` and :meth:`post` are then made again,
    by the next call, so they have to be repeatable; they raise nothing of their own.

    What a handler or ``__del__`` calls must not wait here (:meth:`post`): its thread may hold something
    else, which the thread that holds this lock waits for.
    """

    def __init__(self) -> None:
        self.hand_over: Callable[[Callable[[], None]], object] | None = None
        """Has another thread make what others go on asking for; without, whoever is here makes it."""
        self._lock = threading.RLock()
        self._changing = False
        self._changes: deque[Callable[[], object]] = deque()

    def run(self, change: Callable[[], T]) -> T:
        """Make a change that cannot be put off; its result.

        Raises ``RuntimeError`` where this thread is in the middle of another one.
        """
        held: list[bool] = []
        try:
            held += map(self._lock.acquire, WAITING)
            if self._changing:
                raise RuntimeError(
                    "this thread is inside another call of this engine, which a signal handler or "
                    "__del__ has interrupted: only freeing, removing keys, unregistering, stats and "
                    "finalize are possible there; do the rest once that call has returned"
                )
            self._changing = True
            try:
                self._make_all()
                return change()
            finally:
                self._changing = False
        finally:
            if held:
                self._lock.release()
            if self._changes:
                self._serve(NON_BLOCKING)

    def run_at_once(self, change: Callable[[], object]) -> bool:
        """Make a change that waits for nobody, where nobody is at one or has asked for one.

        False where that was not so, or is not so any more: the caller has :meth:`run` the change (once
        more), and with it those that were asked for meanwhile, where waiting is possible.
        """
        held: list[bool] = []
        try:
            held += map(self._lock.acquire, NON_BLOCKING)
            if True not in held or self._changing or self._changes:
                return False
            self._changing = True
            try:
                change()
            finally:
                self._changing = False
        finally:
            if True in held:
                self._lock.release()
        return not self._changes

    def do(self, change: Callable[[], object]) -> None:
        """Make a change now, once other threads have made theirs.

        Where this thread is in the middle of another one, after that.
        """
        self._changes.append(change)
        self._serve(WAITING)

    def post(self, change: Callable[[], object]) -> None:
        """Make a change now, or let the thread make it that is in the middle of another one.

        Waits for nobody. :meth:`run`, :meth:`do` and :meth:`serve` find it made.
        """
        self._changes.append(change)
        self._serve(NON_BLOCKING)

    def leave(self, change: Callable[[], object]) -> None:
        """Let the next call make a change."""
        self._changes.append(change)

    def serve(self, wait: bool = True) -> None:
        """Make the changes that somebody was asked for and an exception has kept from being made.

        Without ``wait``, those that another thread is about to make are left to it.
        """
        if self._changes:
            self._serve(WAITING if wait else NON_BLOCKING)

    def _serve(self, how: tuple[bool]) -> None:
        """Whoever holds the lock looks for changes once more after letting go of it."""
        rounds = 0
        while self._changes:
            if rounds == ROUNDS and self.hand_over is not None:
                self.hand_over(lambda: self.serve(wait=False))
                return
            rounds += 1
            held: list[bool] = []
            try:
                held += map(self._lock.acquire, how)
                if True not in held or self._changing:
                    return
                self._changing = True
                try:
                    self._make_all()
                finally:
                    self._changing = False
            finally:
                if True in held:
                    self._lock.release()

    def _make_all(self) -> None:
        """Those that are here by now: others may ask for more without end."""
        for _ in range(len(self._changes)):
            self._changes[0]()
            self._changes.popleft()

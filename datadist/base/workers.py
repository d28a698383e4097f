"""A few daemon threads for what may take long: steps of linking, requests of peers, look-ups."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable

from datadist.base.calls import entry
from datadist.base.threads import start

log = logging.getLogger("datadist.engine")


class Workers:
    """Runs submitted calls, those of one ``owner`` on some of the threads only.

    All threads start with the constructor, which raises ``RuntimeError`` where one cannot. Never hands a
    waiting step a thread to wait on. ``most`` is how many calls of one owner run at one time: the others
    wait, and owners that wait take turns.
    """

    def __init__(self, count: int, name: str, most: int | None = None) -> None:
        self._most = max(1, count - 1) if most is None else most
        self._ready = threading.Condition()
        self._waiting: dict[Hashable, deque[Callable[[], None]]] = {}
        """By owner; the owner whose turn is next comes first."""
        self._running: Counter[Hashable] = Counter()
        self._stopping = False
        self._living = 0
        self._refusing = False
        self._threads: list[threading.Thread] = []
        try:
            for number in range(count):
                thread = threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True)
                start(thread)
                self._living += 1
                self._threads.append(thread)
        except BaseException:
            self.stop()
            raise

    def submit(self, call: Callable[[], None], owner: Hashable = None) -> None:
        """Run ``call`` when a thread is free; without an owner, whatever else runs."""
        with self._ready:
            if not self._refusing:
                self._waiting.setdefault(owner, deque()).append(call)
                self._ready.notify()

    def tell(self, drop: bool = False) -> None:
        """Have the threads end once what was submitted has finished, without waiting for it.

        With ``drop`` only what runs finishes: what waits, and what is submitted from now on, is dropped.
        """
        with self._ready:
            self._stopping = True
            if drop:
                self._refusing = True
                self._waiting.clear()
            self._ready.notify_all()

    def stop(self, timeout: float = 5.0, drop: bool = False) -> None:
        """:meth:`tell`, and wait for the threads within ``timeout`` seconds: once, for all of them."""
        deadline = time.monotonic() + timeout
        self.tell(drop)
        with self._ready:
            self._ready.wait_for(lambda: not self._living, timeout)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _next(self) -> tuple[Hashable, Callable[[], None]] | None:
        """Wait for a call that may run now; None at the end."""
        with self._ready:
            while True:
                for owner, calls in self._waiting.items():
                    if owner is None or self._running[owner] < self._most:
                        del self._waiting[owner]
                        call = calls.popleft()
                        if calls:
                            self._waiting[owner] = calls
                        self._running[owner] += 1
                        return owner, call
                if self._stopping and not self._waiting:
                    return None
                self._ready.wait()

    def _done(self, owner: Hashable) -> None:
        """One call of ``owner`` less runs. At most one that waits may begin now, and this thread is
        about to look for it: others are woken only to end.
        """
        with self._ready:
            self._running[owner] -= 1
            if not self._running[owner]:
                del self._running[owner]
            if self._stopping:
                self._ready.notify_all()

    @entry
    def _run(self) -> None:
        while (found := self._next()) is not None:
            owner, call = found
            try:
                call()
            except Exception:
                log.exception("unexpected error in a worker; please report it")
            finally:
                self._done(owner)
            del call, found  # the reference would keep an ended link alive until the next call
        with self._ready:
            self._living -= 1
            if not self._living:
                self._ready.notify_all()

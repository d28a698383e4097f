"""A few daemon threads for the CPU-heavy steps of linking (map, populate, close)."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

log = logging.getLogger("datadist.engine")


class Workers:
    """Runs submitted calls; never hands a waiting step a thread to wait on."""

    def __init__(self, count: int, name: str) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True)
            for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], None]) -> None:
        """Run ``call`` when a thread is free."""
        self._queue.put(call)

    def stop(self, timeout: float = 5.0) -> None:
        """Let what was submitted finish, then end the threads."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(timeout)

    def _run(self) -> None:
        while (call := self._queue.get()) is not None:
            try:
                call()
            except Exception:
                log.exception("unexpected error in a worker; please report it")
            del call  # which would keep a link that has ended until the next one comes

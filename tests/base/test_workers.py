"""The threads for the heavy steps of linking."""

from __future__ import annotations

import threading
import time
import weakref

from datadist.base.workers import Workers


class Link:
    """Something that a step uses."""


def test_an_idle_worker_keeps_nothing_of_its_last_step() -> None:
    workers = Workers(1, "idle")
    try:
        link, done = Link(), threading.Event()
        seen = weakref.ref(link)
        workers.submit(lambda link=link: done.set())  # type: ignore[misc]
        del link
        assert done.wait(5.0)
        deadline = time.monotonic() + 5.0
        while seen() is not None and time.monotonic() < deadline:
            time.sleep(0.001)
        assert seen() is None
    finally:
        workers.stop()

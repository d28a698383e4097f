"""Threads of this process, also those of native code, which Python does not see."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.nodes import Here, Node
from tests.waiting import comes_true

SECONDS = 20.0


def count() -> int:
    """Threads of this process."""
    return len(os.listdir("/proc/self/task"))


def falls_to(number: int) -> bool:
    """Whether no more are left, in time: the kernel lists a thread for a moment after it was joined."""
    return comes_true(lambda: count() <= number, SECONDS)


def rises_to(number: int) -> bool:
    """Whether so many run at once, in time."""
    return comes_true(lambda: count() >= number, SECONDS)


@contextmanager
def meanwhile(function: Callable[[], object]) -> Iterator[None]:
    """Run ``function`` in another thread, which has ended when the block is left."""
    thread = threading.Thread(target=function)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def with_helpers(function: Callable[[Here], None]) -> None:
    """Run a function of a test module where shm starts all helper threads, however busy it is."""
    node = Node({"DATADIST_ALWAYS_HELP": "1"})
    try:
        node.do(function)
    finally:
        node.close()

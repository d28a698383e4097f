"""Starting threads where memory may be short."""

from __future__ import annotations

import mmap
import resource
import threading

from datadist.base.callers import pass_on

__all__ = ["START_SECONDS", "check_room", "start"]

START_SECONDS = 5.0
"""After so long a thread that was made has begun, or has ended for want of memory."""
USUAL_STACK = 8 << 20
BESIDE = 4 << 20
"""What a new thread of Python maps beside its stack, and some more for the others."""


def start(thread: threading.Thread) -> None:
    """Start a thread. Raises ``RuntimeError``, as `threading` does, where none can be started."""
    check_room()
    thread.start()


def check_room() -> None:
    """Raise ``RuntimeError`` unless a thread has room for its stack and its first steps.

    A thread that finds no memory for these ends, and `threading` waits for it without end (Python
    before 3.14).
    """
    try:
        mmap.mmap(-1, _stack() + BESIDE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 0).close()
    except (OSError, MemoryError) as error:
        pass_on(error)
        raise RuntimeError(f"can't start new thread: no memory for its stack ({error})") from None


def _stack() -> int:
    chosen = threading.stack_size()
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return chosen or (USUAL_STACK if soft == resource.RLIM_INFINITY else soft)

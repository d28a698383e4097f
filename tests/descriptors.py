"""Descriptors of the process of the tests, to see that nothing was left open."""

from __future__ import annotations

import contextlib
import gc
import os

from tests.waiting import comes_true

__all__ = ["count", "count_in", "fall_to_in", "falls_to", "is_open", "targets"]

SECONDS = 20.0


def count() -> int:
    """How many are open, once what earlier tests have left was collected."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def falls_to(number: int) -> bool:
    """Whether no more are left, in time: other threads may close some yet, also of earlier tests."""
    return comes_true(lambda: count() <= number, SECONDS)


def count_in(_here: object) -> int:
    """:func:`count`, of a node."""
    return count()


def fall_to_in(_here: object, number: int) -> bool:
    """:func:`falls_to`, of a node."""
    return falls_to(number)


def is_open(fd: int) -> bool:
    """Whether this process has that one."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def targets(pid: int | str = "self") -> list[str]:
    """What the open ones of a process lead to; others may be closed meanwhile."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found

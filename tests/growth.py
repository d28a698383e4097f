"""How the work of an operation grows with what it is given, without seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

TRIES = 4
ROUNDS = 5
MOST = 8.0
"""Times the work for four times as much: 4 is linear, 16 quadratic."""


def growth(prepare: Callable[[int], Callable[[], object]], count: int, most: float = MOST) -> float:
    """Work for ``4 * count`` against work for ``count``: processor time of this thread, best of some.

    ``prepare`` makes what is needed for a number of items, and returns what is to be measured. Measured
    again where it is above ``most``, since others that run evict caches: the least is returned.
    """
    least = float("inf")
    for _ in range(ROUNDS):
        least = min(least, _best(prepare, 4 * count) / max(_best(prepare, count), 1e-5))
        if least < most:
            break
    return least


def _best(prepare: Callable[[int], Callable[[], object]], count: int) -> float:
    spent = []
    for _ in range(TRIES):
        work = prepare(count)
        before = time.thread_time()
        work()
        spent.append(time.thread_time() - before)
    return min(spent)

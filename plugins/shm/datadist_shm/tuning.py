"""How fast this machine copies, in words: what native code measures to choose a kernel and threads."""

from __future__ import annotations

import os
from collections.abc import Mapping

from datadist_shm import _native
from datadist_shm.options import copy_threads


def measure() -> Mapping[str, str]:
    """The choice of large transfers and the figures behind it."""
    try:
        (kernel, threads), kernels, together, scaling = _native.tune(copy_threads())
    except OSError as error:
        return {"copies": f"cannot be measured: {os.strerror(error.errno or 0)}"}
    figures = [f"{name} {_speed(speed)}" for name, speed in kernels.items()]
    steps = [f"{_speed(speed)} by {count}" for count, speed in scaling]
    return {
        "copy kernel": f"{kernel} (datadist.shm.kernel); GB/s by {_threads(together)}: "
        + ", ".join(figures),
        "copy threads": f"{min(threads, copy_threads())} at most (datadist.shm.threads); GB/s: "
        + ", ".join(steps),
    }


def _speed(speed: float) -> str:
    return f"{speed / 1e9:.1f}"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"

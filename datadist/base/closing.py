"""Closing descriptors that another process made, which may hang."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence

from datadist.base import threads

__all__ = ["close_elsewhere"]


def close_elsewhere(fds: Sequence[int]) -> None:
    """Close descriptors on a thread of their own. Raises ``RuntimeError`` where none can start."""

    def close() -> None:
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)

    threads.start(threading.Thread(target=close, name="datadist-closer", daemon=True))

"""Descriptors of other processes (pidfd_open)."""

from __future__ import annotations

import select

__all__ = ["has_ended"]


def has_ended(pidfd: int) -> bool:
    """Whether the process of this descriptor has ended; it need not be waited for yet."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))

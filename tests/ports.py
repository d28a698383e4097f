"""Ports for tests: none of those that the kernel chooses, which any process may get meanwhile."""

from __future__ import annotations

import os
import random
import socket
from contextlib import ExitStack, suppress

LOOPBACK = "127.0.0.1"
FIRST, PER_WORKER, WORKERS = 10_000, 1000, 12
"""Below the kernel's (net.ipv4.ip_local_port_range) and below those of rank 0 (26500 and more)."""


def free(count: int) -> list[int]:
    """So many ports that nobody uses; workers of pytest-xdist have different ones."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % WORKERS
    first = FIRST + worker * PER_WORKER
    found: list[int] = []
    with ExitStack() as stack:
        for port in random.SystemRandom().sample(range(first, first + PER_WORKER), PER_WORKER):
            if len(found) == count:
                break
            sock = stack.enter_context(socket.socket())
            with suppress(OSError):
                sock.bind((LOOPBACK, port))
                found.append(port)
    assert len(found) == count, f"fewer than {count} ports of {PER_WORKER} are free"
    return found

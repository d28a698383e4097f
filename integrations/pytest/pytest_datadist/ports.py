"""Ports for programs that cannot listen at port 0."""

from __future__ import annotations

import os
import random
import re
import socket
from contextlib import ExitStack, suppress

LOOPBACK = "127.0.0.1"
FIRST, PER_WORKER, WORKERS = 12_000, 500, 24
"""Below those that the kernel chooses itself (net.ipv4.ip_local_port_range)."""


def free(count: int) -> list[int]:
    """So many ports that nobody uses now. Raises ``OSError`` where there are fewer."""
    number = re.sub(r"\D", "", os.environ.get("PYTEST_XDIST_WORKER", "")) or "0"
    first = FIRST + int(number) % WORKERS * PER_WORKER
    found: list[int] = []
    with ExitStack() as stack:
        for port in random.SystemRandom().sample(range(first, first + PER_WORKER), PER_WORKER):
            if len(found) == count:
                break
            sock = stack.enter_context(socket.socket())
            with suppress(OSError):
                sock.bind((LOOPBACK, port))
                found.append(port)
    if len(found) < count:
        raise OSError(
            f"of the ports {first} to {first + PER_WORKER - 1} only {len(found)} are free"
        )
    return found

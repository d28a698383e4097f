"""Objects and descriptors over a pipe between a test and its own processes."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any


def send(pipe: Connection, value: object, fds: Sequence[int] = ()) -> None:
    """Send a value and copies of descriptors."""
    pipe.send((value, len(fds)))
    for fd in fds:
        reduction.send_handle(pipe, fd, 0)


def receive(pipe: Connection) -> tuple[Any, list[int]]:
    """A value and its descriptors, which the caller owns. Raises ``EOFError``."""
    value, count = pipe.recv()
    return value, [reduction.recv_handle(pipe) for _ in range(count)]

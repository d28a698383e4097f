"""Resources that are missing at one moment: the n-th call that takes one fails, as the system would."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

SECONDS = 60.0
START_THREAD = "_start_joinable_thread"
"""Of threading, from Python 3.13 on; before it is ``_start_new_thread``."""


def _refuses(number: int) -> Callable[[], Exception]:
    return lambda: OSError(number, os.strerror(number))


def _no_thread() -> Exception:
    return RuntimeError("can't start new thread")


def _takers() -> dict[str, tuple[list[tuple[Any, str]], Callable[[], Exception]]]:
    """By name: the places of a function that takes a resource, and what it raises where there is none."""
    import _thread

    from datadist_shm import _native, link

    full, short = _refuses(errno.EMFILE), _refuses(errno.ENOMEM)
    own = START_THREAD if hasattr(threading, START_THREAD) else "_start_new_thread"
    return {
        "thread": ([(threading, own), (_thread, "start_new_thread")], _no_thread),
        "open": ([(os, "open")], full),
        "file": ([(Path, "open"), (Path, "read_text")], full),
        "dup": ([(os, "dup")], full),
        "socket": ([(socket.socket, "__init__")], full),
        "accept": ([(socket.socket, "accept")], full),
        "eventfd": ([(os, "eventfd")], full),
        "pidfd": ([(os, "pidfd_open")], full),
        "epoll": ([(select, "epoll")], full),
        "memfd": ([(os, "memfd_create")], full),
        "memfd-memory": ([(os, "memfd_create")], short),
        "ftruncate": ([(os, "ftruncate")], short),
        "fcntl": ([(fcntl, "fcntl")], short),
        "mkdir": ([(os, "mkdir")], _refuses(errno.ENOSPC)),
        "symlink": ([(os, "symlink"), (os, "rename")], _refuses(errno.ENOSPC)),
        "map": ([(_native, "map")], short),
        "map_peer": ([(_native, "map_peer")], short),
        "populate": ([(_native, "populate")], short),
        "memory": ([(link, "parse_offer"), (link, "OfferData"), (link, "array")], MemoryError),
    }


TAKERS = [
    "thread", "open", "file", "dup", "socket", "accept", "eventfd", "pidfd", "epoll", "memfd",
    "memfd-memory", "ftruncate", "fcntl", "mkdir", "symlink", "map", "map_peer", "populate",
    "memory",
]  # fmt: skip


class Shortage:
    """Counts the calls of a function, on every thread, of which one failed."""

    def __init__(self) -> None:
        self.calls = 0
        self.came = False


@contextmanager
def missing(name: str, at: int) -> Iterator[Shortage]:
    """The call number ``at`` (from 0) of what takes a resource fails, and no other one."""
    places, error = _takers()[name]
    shortage, lock = Shortage(), threading.Lock()

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            fileno = args[4] if len(args) > 4 else options.get("fileno")
            if fileno is not None:  # the object of a socket that is there
                return function(*args, **options)
            with lock:
                number, shortage.calls = shortage.calls, shortage.calls + 1
            if number == at:
                shortage.came = True
                raise error()
            return function(*args, **options)

        return call

    with ExitStack() as stack:
        for owner, attribute in places:
            new = wrapped(getattr(owner, attribute))
            stack.enter_context(mock.patch.object(owner, attribute, new))
        yield shortage


def held() -> dict[str, int]:
    """What this process has open: descriptors, threads (of the kernel), shared mappings."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "mappings": sum("memfd:" in line for line in maps),
    }


def settled(before: dict[str, int]) -> dict[str, int]:
    """What is held, once that is no more than before, or after a long time."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        now = held()
        if all(now[each] <= before[each] for each in before):
            return before
        time.sleep(0.01)
    return now

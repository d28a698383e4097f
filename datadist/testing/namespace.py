"""Network namespaces of the kernel: making and entering them, which takes root."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

CLONE_NEWNET = 0x40000000

T = TypeVar("T")


def on_a_thread(call: Callable[[], T]) -> T:
    """What a call returns or raises on a thread of its own, which may enter a namespace and ends."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def make_namespace(descriptors: list[int]) -> None:
    """Append the descriptor of a new network namespace. Raises ``OSError``."""

    def make() -> None:  # signal handlers run on another thread: none comes before the append
        _call("unshare", CLONE_NEWNET)
        descriptors.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

    on_a_thread(make)


def enter(path: str) -> None:
    """Move the calling thread, and those that it starts, into a namespace. Raises ``OSError``."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call("setns", descriptor, CLONE_NEWNET)
    finally:
        os.close(descriptor)


def _call(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")

"""Users and capabilities for tests: what a node gives up, so that it may not read every process."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests import nodes

PR_SET_DUMPABLE, PR_CAPBSET_DROP = 4, 24
CAP_SYS_PTRACE = 19
CAPABILITY_VERSION = 0x20080522
NOBODY = 65534


def drop_ptrace(here: nodes.Here | None = None) -> None:
    """Give CAP_SYS_PTRACE up, for good."""
    del here
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()
    _check("capget", header, sets)
    for index in range(3):  # effective, permitted, inheritable; the lower 32 bits of each
        sets[index] &= ~(1 << CAP_SYS_PTRACE)
    _check("capset", header, sets)


def set_dumpable(here: nodes.Here | None = None, value: int = 0) -> None:
    """Whether others of our user may trace and read this process."""
    del here
    _check("prctl", PR_SET_DUMPABLE, ctypes.c_ulong(value), 0, 0, 0)


def become(here: nodes.Here | None = None, user: int = NOBODY) -> None:
    """Be another user from now on. The kernel makes the process not dumpable by that."""
    del here
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def in_child(call: Callable[[], object]) -> str:
    """What a call returns in a process of its own, as text."""
    reading, writing = os.pipe()
    _wait_for_threads()
    pid = os.fork()
    if pid == 0:
        try:
            text = str(call())
        except BaseException as error:
            text = repr(error)
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return text


def _wait_for_threads() -> None:
    """Until all others sleep: a lock that one holds in a sanitizer's allocator stays taken in a child."""
    own, deadline = str(threading.get_native_id()), time.monotonic() + 5
    while time.monotonic() < deadline:
        others = [each for each in Path("/proc/self/task").iterdir() if each.name != own]
        if all(_state(each) in "SZX" for each in others):
            return
        time.sleep(0.001)


def _state(thread: Path) -> str:
    try:
        return (thread / "stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return "X"


def _check(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")

"""Seccomp filters for tests: system calls that a process is refused, as in containers."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Sequence
from functools import cache

import pytest

from tests import nodes

NUMBERS = {
    "x86_64": {
        "epoll_create1": 291, "eventfd2": 290, "getsockopt": 55, "madvise": 28, "memfd_create": 319,
        "mincore": 27, "pidfd_open": 434, "pidfd_send_signal": 424, "prctl": 157,
        "process_vm_readv": 310, "process_vm_writev": 311, "sched_getaffinity": 204,
        "fallocate": 285, "fcntl": 72, "fstatfs": 138,
        "setpriority": 141, "socket": 41, "socketpair": 53, "membarrier": 324,
    },
    "aarch64": {
        "epoll_create1": 20, "eventfd2": 19, "getsockopt": 209, "madvise": 233, "memfd_create": 279,
        "mincore": 232, "pidfd_open": 434, "pidfd_send_signal": 424, "prctl": 167,
        "process_vm_readv": 270, "process_vm_writev": 271, "sched_getaffinity": 123,
        "fallocate": 47, "fcntl": 25, "fstatfs": 44,
        "setpriority": 140, "socket": 198, "socketpair": 199, "membarrier": 283,
    },
}  # fmt: skip
PEERPIDFD = "getsockopt:SO_PEERPIDFD"
"""Not the whole call: what gives the process at the other end of a socket since Linux 6.5."""
SO_PEERPIDFD = 77
NO_PIDFD = ("pidfd_open", PEERPIDFD)
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, MODE_FILTER = 38, 22, 2
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
NUMBER_AT, THIRD_ARGUMENT_AT = 0, 32


class _Program(ctypes.Structure):
    _fields_ = (("count", ctypes.c_ushort), ("code", ctypes.c_void_p))


def refuse(here: nodes.Here, calls: Sequence[str], error: int = errno.EPERM) -> None:
    """Refuse calls from now on to this thread and those that it starts; for good."""
    del here
    install(calls, error)


def install(calls: Sequence[str], error: int = errno.EPERM) -> None:
    """The same, in any process. Raises OSError."""
    code = b"".join(_instructions(call, error) for call in calls) + _step(RETURN, ALLOW)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (PR_SET_NO_NEW_PRIVS, 1, 0),
        (PR_SET_SECCOMP, MODE_FILTER, ctypes.byref(program)),
    ):
        if libc.prctl(arguments[0], *map(_long, arguments[1:]), 0, 0) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _long(value: object) -> object:
    return ctypes.c_ulong(value) if isinstance(value, int) else value


def _instructions(call: str, error: int) -> bytes:
    name, _, option = call.partition(":")
    number = NUMBERS[platform.machine()][name]
    refusal = _step(RETURN, ERRNO | error)
    if option:  # of getsockopt
        refusal = _step(LOAD, THIRD_ARGUMENT_AT) + _step(EQUAL, SO_PEERPIDFD, skip=1) + refusal
    return _step(LOAD, NUMBER_AT) + _step(EQUAL, number, skip=len(refusal) // 8) + refusal


def _step(operation: int, value: int, skip: int = 0) -> bytes:
    """One instruction of classic BPF; a comparison skips so many where it does not hold."""
    return struct.pack("HBBI", operation, 0, skip, value)


@cache
def missing() -> str | None:
    """Why no filter can be made here, or None."""
    if platform.machine() not in NUMBERS:
        return f"numbers of system calls of {platform.machine()} are not known"
    pid = os.fork()
    if pid == 0:
        try:
            install(["mincore"])
        except BaseException:
            os._exit(1)
        os._exit(0)
    return "seccomp filters cannot be made here" if os.waitpid(pid, 0)[1] else None


needed = pytest.mark.skipif(missing() is not None, reason=missing() or "")
"""Mark of tests that need filters."""

"""System calls that filters (seccomp profiles of containers and services) refuse to this process."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator

from datadist.base.process_access import POOLS, PROC, REFUSALS, try_access
from datadist.control import kernel_calls
from datadist.diagnosis.finding import Finding, Level, on

PR_GET_DUMPABLE = 3
SHM = on("shm")
NAME = "system calls"


def examine() -> Iterator[Finding]:
    """What is refused and what follows from it; one finding if nothing is."""
    found = [*_of_core(), *_of_shm()]
    if not found:
        found = [Finding(NAME, Level.OK, f"none that is needed is refused ({_filter()})")]
    yield from found


def _of_core() -> Iterator[Finding]:
    try:
        kernel_calls.check()
        for limit in kernel_calls.limits():
            yield Finding(
                NAME, Level.NOTE, limit, "allow it in the seccomp profile to do without that"
            )
    except kernel_calls.CallRefused as error:
        yield Finding(NAME, Level.PROBLEM, str(error), "as said")
    except OSError as error:  # such as missing descriptors
        yield Finding(NAME, Level.PROBLEM, f"cannot be tried: {error}", "ulimit -n")


def _of_shm() -> Iterator[Finding]:
    for write, what in ((False, "read"), (True, "written")):
        if try_access(os.getpid(), write) in REFUSALS:
            yield _note(
                "process_vm_writev" if write else "process_vm_readv",
                f"registered memory of peers cannot be {what} from here",
                f"allow it in the seccomp profile, or {POOLS}",
            )
    tries: dict[str, tuple[Callable[[], object], str]] = {
        "madvise": (lambda: _call("madvise", None, ctypes.c_size_t(0), 0),
                    "pools have no huge pages"),
        "fallocate": (lambda: os.posix_fallocate(-1, 0, 1),
                      "who maps memory waits for a pool that is populated meanwhile"),
        "mincore": (lambda: _call("mincore", None, ctypes.c_size_t(0), None),
                    "pools that are not populated yet are read more slowly"),
        "sched_getaffinity": (lambda: os.sched_getaffinity(0), "all processors count as ours"),
        "prctl": (lambda: _call("prctl", PR_GET_DUMPABLE, 0, 0, 0, 0),
                  "register_cache fails where kernel.yama.ptrace_scope is 1"),
    }  # fmt: skip
    for call, (attempt, effect) in tries.items():
        try:
            attempt()
        except OSError as error:
            if error.errno in REFUSALS:
                yield _note(call, effect, "allow it in the seccomp profile")


def _note(call: str, effect: str, remedy: str) -> Finding:
    return Finding(NAME, Level.NOTE, f"{call} is refused: {effect}", remedy, SHM)


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def _filter() -> str:
    """Whether a filter is in force, as the kernel says."""
    try:
        lines = (PROC / "self/status").read_text().splitlines()
    except OSError:
        return "/proc does not tell whether a filter is in force"
    mode = next((line.split()[1] for line in lines if line.startswith("Seccomp:")), "0")
    return "a seccomp filter is in force" if mode == "2" else "no seccomp filter"

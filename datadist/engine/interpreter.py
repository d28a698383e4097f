"""What an engine needs of the Python that runs it, and of /proc."""

from __future__ import annotations

import os
import sys

from datadist.base.callers import tolerate
from datadist.base.patched_modules import REMEDY, patched
from datadist.status import LLMException, LLMStatusCode

__all__ = [
    "BOOT_ID", "GIL_REMEDY", "NO_GIL", "PROC", "PROC_REMEDY", "check_interpreter", "check_proc",
    "check_proc_for_addresses", "has_gil", "lacks_of_proc",
]  # fmt: skip

PROC = ("/proc/self/fd", "/proc/self/maps", "/proc/thread-self/ns/net")
"""Sockets and memory are reached through descriptors, registered memory is looked up in the mappings."""
BOOT_ID = "/proc/sys/kernel/random/boot_id"
"""Tells the kernels apart whose engines share a runtime directory."""
PROC_REMEDY = (
    "mount all of /proc in this mount namespace or chroot: mount -t proc proc /proc, and for a service "
    "ProcSubset=all"
)
NO_GIL = (
    "this Python runs without the GIL (a free-threaded build), which the library is not made for"
)
GIL_REMEDY = "start the program with PYTHON_GIL=1 or `python -X gil=1`, or use another build"


def check_interpreter(call: str) -> None:
    """Raise LLM_FAILED where gevent or eventlet have replaced what threads need, or without a GIL."""
    found = patched()
    if found:
        raise LLMException(
            f"{call} needs threads, and {found}: {REMEDY}", status_code=LLMStatusCode.LLM_FAILED
        )
    if not has_gil():
        raise LLMException(f"{call}: {NO_GIL}: {GIL_REMEDY}", status_code=LLMStatusCode.LLM_FAILED)


def check_proc() -> None:
    """Raise LLM_FAILED if /proc has not what every engine needs."""
    _require(PROC, "the engine cannot start")


def check_proc_for_addresses(call: str) -> None:
    """Raise LLM_FAILED if /proc has not what links by address need."""
    _require((*PROC, BOOT_ID), call)


def _require(paths: tuple[str, ...], what: str) -> None:
    missing = lacks_of_proc(paths)
    if missing:
        raise LLMException(
            f"{what}: {missing}: {PROC_REMEDY}", status_code=LLMStatusCode.LLM_FAILED
        )


def lacks_of_proc(paths: tuple[str, ...]) -> str:
    """What of /proc is missing, in words; empty if all is there."""
    missing = [path for path in paths if not _exists(path)]
    return f"there is no {', '.join(missing)}" if missing else ""


def _exists(path: str) -> bool:
    with tolerate(OSError):  # `os.path.exists` would swallow what a handler of a signal raises
        os.stat(path)
        return True
    return False


def has_gil() -> bool:
    """Whether one thread at a time runs Python code."""
    enabled = getattr(sys, "_is_gil_enabled", None)  # from Python 3.13 on
    return enabled is None or bool(enabled())

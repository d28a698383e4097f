"""The Python that runs engines: its version, threads and the GIL, and what it sees of /proc."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator

from datadist.base.patched_modules import REMEDY, patched
from datadist.diagnosis.finding import Finding, Level
from datadist.engine.interpreter import (
    BOOT_ID,
    GIL_REMEDY,
    NO_GIL,
    PROC,
    PROC_REMEDY,
    has_gil,
    lacks_of_proc,
)

MEMINFO = "/proc/meminfo"


def examine() -> Iterator[Finding]:
    """Every finding about the interpreter."""
    version = f"{platform.python_implementation()} {platform.python_version()}"
    libc = (
        " ".join(platform.libc_ver()).strip() or "a C library other than glibc, which was not tried"
    )
    yield Finding("Python", Level.OK, f"{version}, {sys.executable}, {libc}")
    yield gil(has_gil())
    yield threads(patched())
    yield proc(lacks_of_proc(PROC), lacks_of_proc((BOOT_ID, MEMINFO)))


def gil(present: bool) -> Finding:
    """Whether one thread at a time runs Python code."""
    if present:
        return Finding("GIL", Level.OK, "present")
    return Finding("GIL", Level.PROBLEM, NO_GIL, GIL_REMEDY)


def threads(replaced: str) -> Finding:
    """Whether threads are those of the operating system."""
    if not replaced:
        return Finding("threads", Level.OK, "Python's own")
    return Finding("threads", Level.PROBLEM, replaced, REMEDY)


def proc(missing: str, less: str) -> Finding:
    """Whether /proc has what engines need, and what links by address and checks of memory need."""
    if not missing and less:
        return Finding("/proc", Level.NOTE, f"{less}: links by address fail", PROC_REMEDY)
    if not missing:
        return Finding("/proc", Level.OK, "mounted")
    return Finding("/proc", Level.PROBLEM, missing, PROC_REMEDY)

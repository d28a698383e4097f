"""Processes, for people: which program runs there, and for how long."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

MOST = 80
"""Characters of a program's name that are shown."""


def own_program() -> str:
    """The script that this process runs, without its arguments, which may hold secrets."""
    script = sys.argv[0] if getattr(sys, "argv", None) else ""
    name = f"python {script}" if script in ("-c", "-m") else Path(script).name
    shown = name or Path(sys.executable or "unknown").name
    return shown.encode(errors="replace").decode()[:MOST]  # names of files may be no text


def program_of(pid: int) -> str:
    """The same of another process; "unknown" where that cannot be seen."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "unknown"
    name = Path(words[0]).name
    if name.startswith("python"):
        script = next((word for word in words[1:] if word in ("-c", "-m") or word[:1] != "-"), "")
        name = f"python {script}" if script in ("-c", "-m") else Path(script).name or name
    return name[:MOST] or "unknown"


def now() -> float:
    """Seconds on a clock that all processes of the host share, and that nobody sets."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def described(pid: int | None, program: str, age: float | None = None) -> str:
    """A process in words: "pid 4711, decode.py, 3 min old"."""
    words = ["an unknown process" if pid is None else f"pid {pid}", *([program] if program else [])]
    if age is not None:
        words.append(f"{_duration(age)} old")
    return ", ".join(words)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def processes_of_this_user() -> list[int]:
    """Ids of the processes that this user may look into, but for this one."""
    own, uid, found = os.getpid(), os.geteuid(), []
    try:
        entries = list(os.scandir("/proc"))
    except OSError:
        return []
    for entry in entries:
        try:
            if entry.name.isdecimal() and entry.stat().st_uid == uid and int(entry.name) != own:
                found.append(int(entry.name))
        except OSError:  # it has ended
            continue
    return found

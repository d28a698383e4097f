"""Descriptions of processes for messages: program and age."""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
import time
from pathlib import Path

from datadist.base.process_access import REFUSALS, shows_our_pids

_CREDENTIALS = struct.Struct("3i")
SO_PEERPIDFD = 77
"""linux/socket.h, since Linux 6.5; not in Python's module."""
MAX_NAME = 80
"""Characters of a program's name that are shown."""


def own_program() -> str:
    """The script that this process runs, without its arguments, which may hold secrets."""
    script = sys.argv[0] if getattr(sys, "argv", None) else ""
    return printable(_script(script) or Path(sys.executable or "unknown").name)


def program_of(pid: int) -> str:
    """The same of another process; "unknown" where that cannot be seen."""
    if not shows_our_pids():
        return "unknown"
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "unknown"
    name = Path(words[0]).name
    if name.startswith("python"):
        name = _python_program(words[1:]) or name
    return printable(name) or "unknown"


def _python_program(words: list[str]) -> str:
    """What an interpreter with these arguments runs; "" where that is nothing."""
    rest = iter(words)
    for word in rest:
        if word in ("-X", "-W"):
            next(rest, "")
        elif word == "-m":
            return f"python -m {next(rest, '')}"
        elif word == "-c":
            return "python -c"
        elif not word.startswith("-"):
            return _script(word)
    return ""


def _script(path: str) -> str:
    """A script by its name; one that every package has by the name of its package."""
    if path in ("-c", "-m"):
        return f"python {path}"
    name = Path(path).name
    return f"python -m {Path(path).parent.name}" if name == "__main__.py" else name


def printable(text: str) -> str:
    """A name in one line of bounded length, whoever gave it."""
    safe = text.encode(errors="replace").decode()[:MAX_NAME]  # names of files may be no text
    return "".join(each if each.isprintable() else "?" for each in safe)


def peer_of(sock: socket.socket) -> tuple[int, int]:
    """Process and user at the other end of a Unix socket, as the kernel reports them (SO_PEERCRED).

    The process is 0 where it is in a pid namespace that is not visible from ours.
    """
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _gid = _CREDENTIALS.unpack(raw)
    return pid, uid


def open_peer(sock: socket.socket, pid: int) -> int | None:
    """A descriptor of the process at the other end of a Unix socket; None where there is none to have.

    ``pid`` is from :func:`peer_of`. SO_PEERPIDFD needs no pid, so it serves across pid namespaces; older
    kernels have pidfd_open only, which a seccomp filter may refuse. Raises ``OSError`` where the
    process has ended, or no descriptor is left.
    """
    try:
        return sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
    if pid == 0 or not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno in REFUSALS:
            return None
        raise


def now() -> float:
    """Seconds on a monotonic clock that all processes of the host share."""
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

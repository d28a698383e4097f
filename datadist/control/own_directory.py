"""Directories that only this user can enter, and files in them: making, mending, opening, locking."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

LOCK_SECONDS = 1.0
"""Longest wait for the lock of a directory; its holders need milliseconds."""
_OTHERS = 0o077


class RuntimeDirError(Exception):
    """The directory cannot be used; the text says why and what to do."""


def enter(path: Path, inside: int | None, shown: Path) -> int:
    """Make a directory with mode 0700 unless it is there, and open it, whatever the umask is.

    A directory of ours that its owner may not use (left so by an umask) gets mode 0700. One that
    others may enter is refused. ``path`` is relative to the descriptor ``inside``; ``shown`` is its
    name in messages. Raises :class:`RuntimeDirError`.
    """
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700, dir_fd=inside)
        found = os.open(
            path, os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=inside
        )
        try:
            _check(found, shown)
            return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=found)
        finally:
            os.close(found)
    except OSError as error:
        raise RuntimeDirError(
            f"cannot use the runtime directory {shown}: {error.strerror}; {_remedy(error)} or set "
            "DATADIST_RUNTIME_DIR to a directory that only you can enter"
        ) from error


def _remedy(error: OSError) -> str:
    return {
        errno.ENOSPC: "free space or inodes there",
        errno.EDQUOT: "free space or inodes there",
        errno.EMFILE: "raise the limit on descriptors (`ulimit -n`)",
        errno.EROFS: "mount its file system for writing",
    }.get(error.errno or 0, "create it with mode 0700")


def _check(found: int, shown: Path) -> None:
    info = os.fstat(found)
    mode = stat.S_IMODE(info.st_mode)
    if info.st_uid != os.geteuid() or mode & _OTHERS:
        raise RuntimeDirError(
            f"the runtime directory {shown} belongs to user {info.st_uid} with mode {mode:04o}, "
            f"expected user {os.geteuid()} with mode 0700; correct it or set DATADIST_RUNTIME_DIR"
        )
    if mode & 0o700 != 0o700:
        os.chmod(f"/proc/self/fd/{found}", 0o700)


def open_file(directory: int, name: str, flags: int) -> int:
    """Open a file of the directory, whatever umask it was made under. Raises ``OSError``."""
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = os.open(name, flags, 0o600, dir_fd=directory)
    except PermissionError:
        os.chmod(name, 0o600, dir_fd=directory)
        fd = os.open(name, flags, 0o600, dir_fd=directory)
    if flags & os.O_CREAT:
        os.fchmod(fd, 0o600)
    return fd


@contextlib.contextmanager
def locked(directory: int, seconds: float = LOCK_SECONDS) -> Iterator[bool]:
    """Hold the lock of a directory; True where it is held.

    Waiting for another holder is limited, since it may be stopped. Raises ``OSError`` where no
    descriptor is left.
    """
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        deadline = time.monotonic() + seconds
        held = _try_lock(fd)
        while not held and time.monotonic() < deadline:
            time.sleep(0.001)
            held = _try_lock(fd)
        yield held
    finally:
        with contextlib.suppress(OSError):  # a child that was forked meanwhile has it, too
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # a file system without locks has none to wait for
        return error.errno != errno.EWOULDBLOCK
    return True

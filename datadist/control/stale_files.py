"""Removes files of crashed processes from the runtime directory; each `init` does it for all jobs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import struct
import time

from datadist.control.runtime_dir import RuntimeDir, is_listening_name

SECONDS = 60.0
"""Age at which a name that engines have for a moment only is left over."""
_HIDDEN = re.compile(r"^\.[0-9a-f]{32}(-\d{1,5})?$")
_CLAIM = re.compile(r"^\d{1,20}\.claim$")
_REFUSED = re.compile(r"^(\d{1,20}-[0-9a-f]{32})\.refused$")
_FLOCK = struct.Struct("hhqqi4x")
"""``struct flock`` of Linux with 64-bit offsets: type, whence, start, length, pid."""


def remove_stale_files(directory: RuntimeDir) -> None:
    """Remove stale files of all jobs, and directories of other jobs that are then empty.

    No claim may be held by this process: looking at one closes a descriptor of its file.
    """
    _remove_stale_of_job(directory)
    for other in directory.others():
        with contextlib.suppress(OSError):
            _remove_stale_of_job(other)


def _remove_stale_of_job(directory: RuntimeDir) -> None:
    for address in directory.engines():
        with contextlib.suppress(OSError):
            sock = directory.connect(address)  # removes the name where nobody listens
            if sock is not None:
                sock.close()
    with directory.locked():
        names = set(os.listdir(directory.fd))
        for name in names:
            with contextlib.suppress(OSError):  # of a name that is none of ours, too
                if _is_stale(directory.fd, name, names):
                    os.unlink(name, dir_fd=directory.fd)


def _is_stale(directory: int, name: str, names: set[str]) -> bool:
    """Whether a name points nowhere, or is older than any engine needs it."""
    if is_listening_name(name):
        return os.readlink(name, dir_fd=directory) not in names
    refused = _REFUSED.match(name)
    if refused:
        return f"{refused[1]}.sock" not in names
    if _CLAIM.match(name):
        return not _is_locked(directory, name)
    age = time.time() - os.stat(name, dir_fd=directory, follow_symlinks=False).st_mtime
    return bool(_HIDDEN.match(name)) and age > SECONDS


def _is_locked(directory: int, name: str) -> bool:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        found = fcntl.fcntl(fd, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0))
        return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)
    finally:
        os.close(fd)

"""Removes files of crashed processes from the runtime directory; each `init` does it for all jobs.

Only what is proven dead here is removed: names of our kernel, of whose engines no socket listens and
no lock is held. The lock of the directory keeps names that an engine just makes. Names of other kernels
stay.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import struct
import time

from datadist.control.kernel import is_ours
from datadist.control.own_directory import open_file
from datadist.control.runtime_dir import RuntimeDir, kernel_of_listening

SECONDS = 60.0
"""Age at which a name that engines have for a moment only is left over."""
_HIDDEN = re.compile(r"^\.\d{1,20}-[0-9a-f]{32}@([0-9a-f]{8})-\d{1,5}$")
_CLAIM = re.compile(r"^\d{1,20}@([0-9a-f]{8})\.claim$")
_REFUSED = re.compile(r"^(\d{1,20}-[0-9a-f]{32}@([0-9a-f]{8}))\.refused$")
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
    with directory.locked() as held:
        names = set(os.listdir(directory.fd)) if held else set()
        for name in names:
            with contextlib.suppress(OSError):  # of a name that is none of ours, too
                if _is_stale(directory.fd, name, names):
                    os.unlink(name, dir_fd=directory.fd)


def _is_stale(directory: int, name: str, names: set[str]) -> bool:
    """Whether a name of our kernel points nowhere, or is older than any engine needs it."""
    if is_ours(kernel_of_listening(name) or ""):
        return os.readlink(name, dir_fd=directory) not in names
    refused = _REFUSED.match(name)
    if refused:
        return is_ours(refused[2]) and f"{refused[1]}.sock" not in names
    claim = _CLAIM.match(name)
    if claim:
        return is_ours(claim[1]) and not _is_locked(directory, name)
    hidden = _HIDDEN.match(name)
    if hidden is None or not is_ours(hidden[1]):
        return False
    info = os.stat(name, dir_fd=directory, follow_symlinks=False)
    return time.time() - info.st_mtime > SECONDS


def _is_locked(directory: int, name: str) -> bool:
    fd = open_file(directory, name, os.O_RDONLY)
    try:
        found = fcntl.fcntl(fd, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0))
        return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)
    finally:
        os.close(fd)

"""Files of memory that other processes can map (memfd_create), and cannot resize."""

from __future__ import annotations

import fcntl
import os

from datadist.base.file_size import set_size

__all__ = ["RESIZE_SEALS", "create", "create_sealed"]

MFD_NOEXEC_SEAL = 0x08
"""linux/memfd.h, since Linux 6.3; not in Python's module."""
RESIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def create(name: str, extra: int = 0) -> int:
    """A descriptor of new memory that can be sealed. Raises OSError.

    The sysctl vm.memfd_noexec of a pid namespace may permit only such that cannot be executed.
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | extra
    try:
        return os.memfd_create(name, flags)
    except PermissionError:
        return os.memfd_create(name, flags | MFD_NOEXEC_SEAL)


def create_sealed(name: str, size: int, extra: int = 0) -> int:
    """As :func:`create`, of a size that stays. Raises OSError, OverflowError."""
    fd = create(name, extra)
    try:
        set_size(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, RESIZE_SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd

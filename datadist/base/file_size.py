"""The limit on the size of files (`ulimit -f`): beyond it the kernel sends SIGXFSZ, or returns EFBIG."""

from __future__ import annotations

import errno
import os
import resource

LEAST = 4096
"""Bytes that the files of every engine may have."""


def set_size(fd: int, size: int) -> None:
    """Give a file a size, in bytes. Raises ``OSError`` (EFBIG), and never a signal, beyond the limit."""
    check_size(size)
    os.ftruncate(fd, size)


def check_size(size: int) -> None:
    """Raise ``OSError`` (EFBIG) where no file of this process may have so many bytes."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and size > limit:
        raise OSError(
            errno.EFBIG,
            f"files of this process may have {limit} bytes at most, and {size} are needed: raise the "
            "limit (`ulimit -f`, RLIMIT_FSIZE)",
        )

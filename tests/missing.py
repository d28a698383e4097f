"""Memory whose pages come when a test says so, or never: userfaultfd(2), by hand."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct

import numpy as np
import pytest
from numpy.typing import NDArray

UFFD_API, API, REGISTER, COPY = 0xAA, 0xC018AA3F, 0xC020AA00, 0xC028AA03
NEW = 0xAA00
"""The ioctl of /dev/userfaultfd."""
SYSTEM_CALL = {"x86_64": 323, "aarch64": 282}
PAGE = mmap.PAGESIZE


def _open() -> int:
    """Raises OSError where faults of the kernel cannot be held here."""
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        number = SYSTEM_CALL.get(os.uname().machine)
        if number is None:
            raise
        libc = ctypes.CDLL(None, use_errno=True)
        fd: int = libc.syscall(number, os.O_CLOEXEC)
        if fd < 0:
            raise OSError(ctypes.get_errno(), "userfaultfd") from None
        return fd
    try:
        return fcntl.ioctl(device, NEW, os.O_CLOEXEC)
    finally:
        os.close(device)


def skip_unless_possible() -> None:
    """Skip the test where userfaultfd cannot be used."""
    try:
        os.close(_open())
    except OSError as error:
        pytest.skip(f"userfaultfd cannot be used here: {error}")


class Missing:
    """Pages of this process that nobody has made; who touches them waits for :meth:`come`."""

    def __init__(self, pages: int) -> None:
        self._map = mmap.mmap(-1, (pages + 1) * PAGE)
        self._size = pages * PAGE
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.address = start
        self._fd = _open()
        fcntl.ioctl(self._fd, API, bytearray(struct.pack("QQQ", UFFD_API, 0, 0)))
        register = bytearray(struct.pack("QQQQ", start, self._size, 1, 0))
        fcntl.ioctl(self._fd, REGISTER, register)

    def come(self, value: int, page: int = 0, count: int | None = None) -> None:
        """Make ``count`` pages (all) from ``page`` on, filled with ``value``, and wake who waits."""
        size = self._size - page * PAGE if count is None else count * PAGE
        source = ctypes.create_string_buffer(bytes([value]) * (size + PAGE))
        begin = -(-ctypes.addressof(source) // 8) * 8
        copy = bytearray(struct.pack("QQQQq", self.address + page * PAGE, begin, size, 0, 0))
        fcntl.ioctl(self._fd, COPY, copy)

    def go(self, page: int = 0, count: int = 1) -> None:
        """Take pages away again, until they :meth:`come` anew."""
        self._map.madvise(mmap.MADV_REMOVE, page * PAGE, count * PAGE)

    def array(self) -> NDArray[np.uint8]:
        """The memory; touching what has not come waits."""
        return np.frombuffer(self._map, np.uint8, self._size)

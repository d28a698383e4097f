"""Tests run in a network namespace of their own that has only `lo`."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct

import pytest

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS = 0x8914
IFF_UP = 1


def _enter() -> str | None:
    """Leave the host's network for an empty one; why not, where that fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        return f"no network namespace (root is needed): {os.strerror(ctypes.get_errno())}"
    with socket.socket() as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))
    assert [name for _, name in socket.if_nameindex()] == ["lo"]
    return None


REFUSED = _enter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Nothing here may run on the host's network."""
    if REFUSED and os.environ.get("DATADIST_TESTS_REQUIRED") == "1":
        raise pytest.UsageError(f"these tests must run here: {REFUSED}")
    if REFUSED:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=REFUSED))

"""Which kernel this is: sockets, locks and network namespaces of another one cannot be judged here."""

from __future__ import annotations

import functools
import os
from contextlib import suppress
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
UNKNOWN = "0" * 8
"""Where the kernel does not tell its boot id."""


@functools.cache
def kernel_id() -> str:
    """The beginning of the boot id, 8 hexadecimal digits: another one after each boot."""
    with suppress(OSError):
        found = BOOT_ID.read_text()[:8]
        if len(found) == 8 and all(each in "0123456789abcdef" for each in found):
            return found
    return UNKNOWN


def is_ours(kernel: str) -> bool:
    """Whether a name that says this kernel is certainly one of the kernel that we run on."""
    return kernel == kernel_id() != UNKNOWN


def network_namespace() -> str:
    """Names this thread's network namespace and kernel: addresses mean something in one only."""
    return f"{kernel_id()}-{os.stat('/proc/thread-self/ns/net').st_ino}"

"""What the processor of this machine is called."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

__all__ = ["processor"]

CPUINFO = Path("/proc/cpuinfo")


def processor() -> str:
    """The model, as the kernel names it."""
    with suppress(OSError):
        for line in CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown model"

"""What of this process's memory is in its page table."""

from __future__ import annotations


def resident(address: int, field: str = "Rss") -> int:
    """Bytes of the mapping that begins there; ``field`` ShmemPmdMapped: of those in huge pages."""
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if line.startswith(f"{address:x}-"):
                break
        else:
            raise AssertionError(f"no mapping begins at {address:#x}")
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))

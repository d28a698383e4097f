"""Shared memory that a process maps or has open: memfds, as of pools, and files of /dev/shm."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

SHM = "/dev/shm/"
_BEGINS = ("/memfd:", SHM)
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+) +(/.*)$")
_DELETED = " (deleted)"


@dataclass(frozen=True)
class SharedMemory:
    """A file in memory; the inode tells it from any other one."""

    inode: int
    path: str
    size: int = field(compare=False)
    deleted: bool = field(compare=False)

    @classmethod
    def at(cls, inode: int, path: str, size: int) -> SharedMemory:
        """From a path as the kernel shows it."""
        return cls(inode, path.removesuffix(_DELETED), size, path.endswith(_DELETED))

    @property
    def name(self) -> str | None:
        """Its name in /dev/shm; None for memfds and for what was unlinked."""
        if not self.path.startswith(SHM) or self.deleted:
            return None
        return self.path.removeprefix(SHM)

    def __str__(self) -> str:
        return f"shared memory {self.path.removeprefix('/')} ({self.size:,} bytes)"


def shared_memory(pid: int | str = "self") -> set[SharedMemory]:
    """What a process maps or has open; nothing for a process that has ended."""
    found: dict[int, SharedMemory] = {}
    with suppress(OSError):
        for each in (*_mapped(pid), *_open(pid)):
            before = found.get(each.inode)
            if before is None or before.size < each.size:
                found[each.inode] = each
    return set(found.values())


def _mapped(pid: int | str) -> Iterator[SharedMemory]:
    sizes: dict[tuple[int, str], int] = {}
    for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
        match = _MAPPING.match(line)
        if match and match[4].startswith(_BEGINS):
            key = (int(match[3]), match[4])
            sizes[key] = sizes.get(key, 0) + int(match[2], 16) - int(match[1], 16)
    for (inode, path), size in sizes.items():
        yield SharedMemory.at(inode, path, size)


def _open(pid: int | str) -> Iterator[SharedMemory]:
    folder = f"/proc/{pid}/fd"
    for name in os.listdir(folder):
        with suppress(OSError):
            path = os.readlink(f"{folder}/{name}")
            if path.startswith(_BEGINS):
                info = os.stat(f"{folder}/{name}")
                yield SharedMemory.at(info.st_ino, path, info.st_size)


def unlink(memory: SharedMemory) -> None:
    """Remove its name from /dev/shm, if it has one."""
    if memory.name is not None:
        with suppress(OSError):
            os.unlink(SHM + memory.name)

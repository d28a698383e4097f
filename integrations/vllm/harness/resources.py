"""What the processes of a server hold."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from harness.servers import Server


@dataclass(frozen=True)
class Resources:
    """Of one process."""

    memory_mib: int
    """Of its own: without what it shares, as a pool of datadist."""
    descriptors: int
    threads: int
    mappings: int
    """Of memory that processes share (memfd), as the pools of peers."""


def resources(server: Server) -> dict[str, Resources]:
    """By name and process id."""
    return dict(_resources(pid) for pid in processes_of(server))


def processes_of(server: Server) -> list[int]:
    """All processes of a server's group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getpgid(int(entry.name)) == server.pid:
                    found.append(int(entry.name))
            except ProcessLookupError:
                continue
    return sorted(found)


def _resources(pid: int) -> tuple[str, Resources]:
    place = Path(f"/proc/{pid}")
    lines = (place / "status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines if ":" in line)
    return f"{status['Name'].strip()} {pid}", Resources(
        memory_mib=int(status["RssAnon"].split()[0]) // 1024,
        descriptors=len(list((place / "fd").iterdir())),
        threads=int(status["Threads"]),
        mappings=sum("/memfd:" in line for line in (place / "maps").read_text().splitlines()),
    )

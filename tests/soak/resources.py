"""What the processes of a soak use, and whether it grows.

It is compared at rest only, when no link is left: a process has then what it had before it ever
linked, if nothing leaks. What wobbles is met by comparing minima of the beginning and of the end.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PEER_MEMORY = "memfd:datadist"


@dataclass(frozen=True)
class Usage:
    """Of one process at one moment; ``resident`` in bytes."""

    resident: int
    descriptors: int
    threads: int
    mappings: int
    pools: int
    """Mappings of pools, our own and peers'."""


ALLOWED = {"resident": 24 << 20, "descriptors": 3, "threads": 2, "mappings": 60, "pools": 0}
"""Growth that is none: arenas of malloc and the interpreter grow for a while."""
ENOUGH = 6
"""Measurements without which nothing can be said."""


def usage(pid: int) -> Usage:
    """What a process uses now. Raises ``OSError`` when it is gone."""
    process = Path(f"/proc/{pid}")
    maps = (process / "maps").read_text()
    return Usage(
        resident=int((process / "statm").read_text().split()[1]) * resource.getpagesize(),
        descriptors=len(os.listdir(process / "fd")),
        threads=len(os.listdir(process / "task")),
        mappings=maps.count("\n"),
        pools=maps.count(PEER_MEMORY),
    )


def growth(rests: Sequence[Usage]) -> dict[str, int]:
    """What grew by more than is allowed, and by how much; nothing of too few measurements."""
    third = len(rests) // 3
    if len(rests) < ENOUGH:
        return {}
    found = {}
    for name, allowed in ALLOWED.items():
        values = [int(getattr(rest, name)) for rest in rests]
        grown = min(values[-third:]) - min(values[:third])
        if grown > allowed:
            found[name] = grown
    return found


def leaks(rests: Mapping[str, Sequence[Usage]]) -> list[str]:
    """Processes whose use grew, one line each."""
    return [
        f"{who}: {name} grew by {grown} within {len(measured)} rests (allowed {ALLOWED[name]})"
        for who, measured in rests.items()
        for name, grown in growth(measured).items()
    ]

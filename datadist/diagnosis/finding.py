"""One result of a check of this machine."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Level(IntEnum):
    """Severity of a finding."""

    OK = 0
    NOTE = 1
    """Works, but not at its best or not for every use."""
    PROBLEM = 2
    """The backends that it concerns do not work."""


@dataclass(frozen=True)
class Finding:
    """What was checked, the result, and the remedy. Empty ``backends`` means all backends."""

    name: str
    level: Level
    found: str
    remedy: str = ""
    backends: frozenset[str] = frozenset()

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return {
            "name": self.name,
            "level": self.level.name.lower(),
            "found": self.found,
            "remedy": self.remedy,
            "backends": sorted(self.backends),
        }


def on(*backends: str) -> frozenset[str]:
    """The backends that a finding concerns."""
    return frozenset(backends)

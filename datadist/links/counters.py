"""What went over each link: operations, bytes, errors and seconds, by direction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from datadist.transport import Placement

if TYPE_CHECKING:
    from datadist.caches.memory import Memory
    from datadist.links.domain import Domain


class Tally:
    """Counts of one direction. An operation that failed counts no bytes."""

    __slots__ = ("bytes", "errors", "operations", "seconds")

    def __init__(self) -> None:
        self.operations = 0
        self.bytes = 0
        self.errors = 0
        self.seconds = 0.0

    def add(self, nbytes: int, seconds: float) -> None:
        """Count an operation that went well."""
        self.operations += 1
        self.bytes += nbytes
        self.seconds += seconds

    def as_dict(self) -> dict[str, int | float]:
        """Plain numbers."""
        return {
            "operations": self.operations,
            "bytes": self.bytes,
            "errors": self.errors,
            "seconds": self.seconds,
        }


class Counters:
    """Both directions of one link to one peer, or of an engine: what *we* began."""

    __slots__ = ("pull", "push")

    def __init__(self) -> None:
        self.pull = Tally()
        self.push = Tally()

    def as_dict(self) -> dict[str, dict[str, int | float]]:
        """Plain numbers."""
        return {"pull": self.pull.as_dict(), "push": self.push.as_dict()}


def link_stats(domains: Iterable[Domain]) -> list[dict[str, Any]]:
    """One entry per peer of every link."""
    rows = []
    for domain in domains:
        attempt = domain.attempt
        for cluster, rank in domain.others.items():
            counters = attempt.counters.get(rank) if attempt is not None else None
            gone = attempt.gone.get(rank) if attempt is not None else None
            rows.append(
                {
                    "comm_id": getattr(domain, "comm_id", None),
                    "name": domain.name,
                    "cluster_id": cluster,
                    "rank": rank,
                    "status": domain.status.name,
                    "error": domain.reason or gone,
                    **(counters or Counters()).as_dict(),
                }
            )
    return rows


def pool_stats(memory: Memory) -> Mapping[str, dict[str, int]]:
    """Pages of each pool by the name of its placement; none without a pool."""
    return {p.name: memory.pool_usage(p) for p in Placement if memory.has_pool(p)}

"""Statistics of an engine's links and memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from datadist.caches.memory import Memory
from datadist.links.counters import Counters
from datadist.links.domain import Domain
from datadist.transport import Placement


def link_stats(domains: Iterable[Domain], backend: str) -> list[dict[str, Any]]:
    """One entry per peer of every link."""
    rows = []
    for domain in domains:
        attempt = domain.attempt
        for cluster, rank in domain.others.items():
            counters = attempt.counters.get(rank) if attempt is not None else None
            gone = attempt.gone.get(rank) if attempt is not None else None
            way = attempt.backends.get(rank, backend) if attempt is not None else None
            rows.append(
                {
                    "comm_id": getattr(domain, "comm_id", None),
                    "name": domain.name,
                    "cluster_id": cluster,
                    "rank": rank,
                    "status": domain.status.name,
                    "backend": way,
                    "error": domain.reason or gone,
                    **(counters or Counters()).as_dict(),
                }
            )
    return rows


def pool_stats(memory: Memory) -> Mapping[str, dict[str, int]]:
    """Pages of each pool by the name of its placement; none without a pool."""
    return {p.name: memory.pool_usage(p) for p in Placement if memory.has_pool(p)}

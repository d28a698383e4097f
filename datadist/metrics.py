"""Counters as Prometheus metrics; needs the extra ``metrics`` (``pip install "datadist[metrics]"``).

from prometheus_client import REGISTRY, start_http_server
from datadist.metrics import StatsCollector

REGISTRY.register(StatsCollector(engine))
start_http_server(9400, "127.0.0.1")
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from datadist.api.llm_datadist import LLMDataDist
from datadist.base.callers import pass_on

__all__ = ["StatsCollector"]

_COUNTERS = {
    "operations": "transfers that succeeded",
    "bytes": "bytes moved by transfers that succeeded",
    "errors": "transfers that failed",
    "seconds": "time spent in transfers",
}


class StatsCollector(Collector):
    """Reads :meth:`LLMDataDist.stats` at every scrape; yields no metrics before `init`.

    ``datadist_transfer_*_total`` count since `init` by ``direction``; ``datadist_link_*`` count per
    link and peer, and end with the link; ``datadist_pool_*`` are the pools. Every metric has the
    labels ``cluster`` and ``backend``; where two transports are combined, that of a link is the one
    which links that peer.
    """

    def __init__(self, engine: LLMDataDist) -> None:
        self._engine = engine

    def describe(self) -> Iterable[Metric]:
        """Empty, since the metrics change with the links."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The metrics of this moment."""
        try:
            stats = self._engine.stats()
        except RuntimeError as error:  # before init, or after finalize
            pass_on(error)
            return
        own = (str(stats["cluster_id"]), str(stats["backend"]))
        yield from _counters("transfer", "", [((*own,), stats["total"])], ("cluster", "backend"))
        links = [
            ((own[0], link["backend"] or own[1], link["name"], str(link["cluster_id"])), link)
            for link in _newest(stats["links"])
        ]
        yield from _counters("link", " on this link", links, ("cluster", "backend", "link", "peer"))
        yield _states(stats["links"], own)
        yield from _pools(stats["pools"], own)


def _newest(links: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest entry per name and peer, since a metric must not have two values."""
    return list({(link["name"], link["cluster_id"]): link for link in links}.values())


def _counters(
    what: str,
    where: str,
    rows: Iterable[tuple[tuple[str, ...], Mapping[str, Any]]],
    labels: tuple[str, ...],
) -> Iterator[Metric]:
    rows = list(rows)
    for name, text in _COUNTERS.items():
        family = CounterMetricFamily(
            f"datadist_{what}_{name}", text + where, labels=(*labels, "direction")
        )
        for values, row in rows:
            for direction in ("pull", "push"):
                family.add_metric((*values, direction), row[direction][name])
        yield family


def _states(links: Iterable[Mapping[str, Any]], own: tuple[str, str]) -> Metric:
    family = GaugeMetricFamily(
        "datadist_links", "peers by state of the link", labels=("cluster", "backend", "state")
    )
    counts = dict.fromkeys(("PREPARING", "OK", "FAILED", "BROKEN"), 0)
    for link in links:
        broken = link["status"] == "OK" and link["error"]
        counts["BROKEN" if broken else link["status"]] += 1
    for state, count in counts.items():
        family.add_metric((*own, state), count)
    return family


def _pools(pools: Mapping[str, Mapping[str, int]], own: tuple[str, str]) -> Iterator[Metric]:
    labels = ("cluster", "backend", "placement")
    used = GaugeMetricFamily("datadist_pool_used_bytes", "pool memory in use", labels=labels)
    free = GaugeMetricFamily("datadist_pool_free_bytes", "pool memory that is free", labels=labels)
    for placement, pool in pools.items():
        used.add_metric((*own, placement), pool["pages_used"] * pool["page_bytes"])
        free.add_metric((*own, placement), pool["pages_free"] * pool["page_bytes"])
    yield used
    yield free

"""The counters of an engine for Prometheus: `python metrics.py PORT`; needs prometheus_client."""

from __future__ import annotations

import sys

from own_caches import start
from prometheus_client import generate_latest


def main(port: int) -> None:
    """Serve the metrics, and look at them once."""
    with start() as engine:
        # region serve
        from prometheus_client import REGISTRY, start_http_server

        from datadist.metrics import StatsCollector

        REGISTRY.register(StatsCollector(engine))
        start_http_server(port, "127.0.0.1")
        # endregion
        assert b"datadist_" in generate_latest(REGISTRY)


if __name__ == "__main__":
    main(int(sys.argv[1]))

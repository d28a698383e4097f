"""What the connector counts: for vLLM's log lines and its ``/metrics``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.v1.metrics.utils import create_metric_per_engine

SECONDS = "load_seconds"
BYTES = "bytes"
FAILURES = "failed_loads"
RECOMPUTED = "recomputed_tokens"
LAPSED = "lapsed_grants"
LOST = "lost_readers"
COUNTERS = {
    BYTES: "Bytes of KV cache that were read from other instances",
    FAILURES: "Loads that failed, by rank; their tokens are computed here, or the request fails",
    RECOMPUTED: "Prompt tokens that were to be loaded, and were not",
    LAPSED: "Grants of blocks here that no decoder read within the lease",
    LOST: "Grants of blocks here whose decoder ended",
}
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)


@dataclass
class DataDistStats(KVConnectorStats):
    """Counts since the last look; ``data`` is plain, since it is sent between processes."""

    def __post_init__(self) -> None:
        if not self.data:
            self.reset()

    def reset(self) -> None:
        """Begin again."""
        self.data: dict[str, Any] = {SECONDS: [], **dict.fromkeys(COUNTERS, 0)}

    def count(self, name: str, amount: int) -> None:
        """Add to a counter."""
        self.data[name] += amount

    def taken(self) -> DataDistStats | None:
        """What was counted, if anything; begins again."""
        if self.is_empty():
            return None
        taken = DataDistStats(data=self.data)
        self.reset()
        return taken

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add what another worker, or another step, has counted."""
        for name, value in other.data.items():
            self.data[name] += value
        return self

    def reduce(self) -> dict[str, int | float]:
        """For a line of the log."""
        seconds = self.data[SECONDS]
        return {
            "loads": len(seconds),
            "MiB": round(self.data[BYTES] / 2**20, 1),
            "longest load (ms)": round(max(seconds, default=0.0) * 1000, 1),
            **{name: self.data[name] for name in COUNTERS if name != BYTES},
        }

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not any(self.data.values())


class DataDistPromMetrics(KVConnectorPromMetrics):
    """The same for Prometheus, by engine of the API server."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._seconds = create_metric_per_engine(
            self._histogram_cls(
                name="vllm:datadist_load_seconds",
                documentation="Time from a load's begin to its end, of those that succeeded",
                buckets=BUCKETS,
                labelnames=labelnames,
            ),
            per_engine_labelvalues,
        )
        self._counters = {
            name: create_metric_per_engine(
                self._counter_cls(
                    name=f"vllm:datadist_{name}", documentation=text, labelnames=labelnames
                ),
                per_engine_labelvalues,
            )
            for name, text in COUNTERS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what `DataDistStats` has counted."""
        for seconds in transfer_stats_data[SECONDS]:
            self._seconds[engine_idx].observe(seconds)
        for name, counter in self._counters.items():
            counter[engine_idx].inc(transfer_stats_data[name])

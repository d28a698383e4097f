"""Options of the rdma transport, from the user's configuration and the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from datadist.plugin_options import number, refuse_unknown
from datadist.transport import TransportOptions
from datadist_rdma.offer import MAX_PAIRS
from datadist_rdma.ports import GidFilter

KNOWN = {
    "device": "name of the RDMA device, such as mlx5_0",
    "port": "port of the device, from 1",
    "gid_index": "place in the port's GID table",
    "timeout": "retransmission time as an exponent, 4.096 us x 2^timeout (1 to 31, default 14)",
    "retry_count": "retransmissions before a peer is given up (0 to 7, default 6)",
    "queue_pairs": "transfers at the same time per link and peer (1 to 64, default 4)",
}
DEFAULT_TIMEOUT, DEFAULT_RETRIES = 14, 6
"""67 ms and 7 attempts. 7 retries would be endless on soft-RoCE."""
DEFAULT_PAIRS = 4


@dataclass(frozen=True)
class Options:
    """The options of the user."""

    gid_filter: GidFilter
    traffic_class: int
    service_level: int
    timeout: int
    retry_count: int
    queue_pairs: int
    """Queue pairs per link and peer: so many transfers run at the same time."""
    attempts: int
    """Attempts to connect to a peer that does not answer, while linking."""

    @property
    def peer_lost_seconds(self) -> float:
        """Seconds after which a silent peer counts as lost; adapters may take up to 4 times that."""
        return 4.096e-6 * (1 << self.timeout) * (self.retry_count + 1)


def parse(options: TransportOptions, environ: Mapping[str, str]) -> Options:
    """Check and convert.

    The configuration comes before ``HCCL_RDMA_TC``, ``HCCL_RDMA_SL``, ``HCCL_RDMA_TIMEOUT`` and
    ``HCCL_RDMA_RETRY_CNT``, variables that clusters have set for HCCL. Raises OptionError.
    """
    refuse_unknown("rdma", options.extra, KNOWN)

    def own(name: str, low: int, high: int, variable: str, default: int | None) -> int | None:
        if name in options.extra:
            return number(f"option datadist.rdma.{name}", options.extra[name], low, high)
        if environ.get(variable):
            return number(variable, environ[variable], low, high)
        return default

    def marked(name: str, value: int | None, high: int, variable: str) -> int:
        if value is not None:
            return number(name, str(value), 0, high)
        return number(variable, environ.get(variable) or "0", 0, high)

    return Options(
        gid_filter=GidFilter(
            options.extra.get("device"),
            own("port", 1, 255, "", None),
            own("gid_index", 0, 255, "", None),
        ),
        traffic_class=marked(
            "llm.RdmaTrafficClass: LLMConfig.rdma_traffic_class",
            options.traffic_class,
            255,
            "HCCL_RDMA_TC",
        ),
        service_level=marked(
            "llm.RdmaServiceLevel: LLMConfig.rdma_service_level",
            options.service_level,
            7,
            "HCCL_RDMA_SL",
        ),
        timeout=own("timeout", 1, 31, "HCCL_RDMA_TIMEOUT", DEFAULT_TIMEOUT) or DEFAULT_TIMEOUT,
        retry_count=own("retry_count", 0, 7, "HCCL_RDMA_RETRY_CNT", DEFAULT_RETRIES) or 0,
        queue_pairs=own("queue_pairs", 1, MAX_PAIRS, "", DEFAULT_PAIRS) or DEFAULT_PAIRS,
        attempts=options.retry_count,
    )

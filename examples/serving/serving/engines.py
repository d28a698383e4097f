"""Engines of a stack that links by address: prefill listens, decoders dial it."""

from __future__ import annotations

from llm_datadist import LLMClusterInfo, LLMConfig, LLMDataDist, LLMRole, LLMStatusCode

POOL = '{"memory_size": 16777216, "page_shift": 12}'
MILLISECONDS = 20_000


def make_engine(role: LLMRole, cluster_id: int, listen: str = "") -> LLMDataDist:
    """An initialised engine; ``listen`` is ``address:port``."""
    config = LLMConfig()
    config.enable_cache_manager = True
    config.local_comm_res = ""
    config.mem_pool_cfg = POOL
    if listen:
        config.listen_ip_info = listen
    engine = LLMDataDist(role, cluster_id)
    engine.init(config.generate_options())
    return engine


def cluster_at(cluster_id: int, address: tuple[str, int]) -> LLMClusterInfo:
    """Where a cluster listens."""
    info = LLMClusterInfo()
    info.remote_cluster_id = cluster_id
    info.append_local_ip_info("127.0.0.1", 0)
    info.append_remote_ip_info(*address)
    return info


def link_with(engine: LLMDataDist, clusters: list[LLMClusterInfo]) -> None:
    """Link with clusters. Raises ``ConnectionError``."""
    status, each = engine.link_clusters(clusters, MILLISECONDS)
    if status != LLMStatusCode.LLM_SUCCESS:
        raise ConnectionError(f"not linked: {each}")

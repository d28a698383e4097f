"""The options of an engine."""

from __future__ import annotations

from datadist import LLMConfig, LLMDataDist, LLMRole


def main() -> None:
    """Make an engine, and end it."""
    # region options
    config = LLMConfig()  # LlmConfig is the same class
    config.enable_cache_manager = True  # required
    config.mem_pool_cfg = '{"memory_size": 67108864, "page_shift": 16}'  # bytes, page = 64 KiB
    config.sync_kv_timeout = 1000  # ms that one pull may take (default 1000)
    config.link_total_time = 60  # s until a link that is not complete is FAILED
    config.transfer_backend = "auto"  # or a name that `datadist backends` lists, or two: "shm+rdma"
    engine = LLMDataDist(LLMRole.PROMPT, cluster_id=1)
    engine.init(config.generate_options())
    # endregion
    # region again
    if LLMDataDist.llm_engine_instance is not None:
        LLMDataDist.llm_engine_instance.finalize()
    # endregion
    # region module
    config.transfer_backend = "datadist_shm:ShmTransport"  # or DATADIST_BACKEND=...
    # endregion
    engine.init(config.generate_options())
    print(f"backend {engine.backend}")
    engine.finalize()


if __name__ == "__main__":
    main()

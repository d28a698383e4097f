"""A KV connector for vLLM: prefill and decode instances whose KV caches move over datadist."""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Make ``"kv_connector": "DataDistConnector"`` known. vLLM calls this in each of its processes."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if "DataDistConnector" not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(
            "DataDistConnector", "datadist_vllm.connector", "DataDistConnector"
        )

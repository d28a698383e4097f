"""`llm_datadist` on top of datadist: the documented names of the package (LLM-DataDist API, exports)."""

from typing import Any

from datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    CacheTask,
    DataType,
    KvCache,
    LayerSynchronizer,
    LLMClusterInfo,
    LLMConfig,
    LlmConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    MemInfo,
    Memtype,
    Placement,
    RegisterMemStatus,
    Status,
    TransferConfig,
    TransferWithCacheKeyConfig,
)

__all__ = [  # the three names of the first version are left out, so that `import *` works
    "BlocksCacheKey",
    "Cache",
    "CacheDesc",
    "CacheKey",
    "CacheKeyByIdAndIndex",
    "CacheTask",
    "DataType",
    "KvCache",
    "LLMClusterInfo",
    "LLMConfig",
    "LLMDataDist",
    "LLMException",
    "LLMRole",
    "LLMStatusCode",
    "LayerSynchronizer",
    "LlmConfig",
    "MemInfo",
    "Memtype",
    "Placement",
    "RegisterMemStatus",
    "Status",
    "TransferConfig",
    "TransferWithCacheKeyConfig",
]
v2_list = __all__


def __getattr__(name: str) -> Any:
    if name in ("Tensor", "TensorDesc", "KvCacheManager"):
        import importlib

        return getattr(importlib.import_module("llm_datadist_v1"), name)
    raise AttributeError(f"Module 'llm_datadist' has no attribute '{name}'")

"""LLM-DataDist API: link clusters and move KV caches, over interchangeable transports."""

import os

from datadist.api.cache import Cache
from datadist.api.config import LLMConfig, LlmConfig
from datadist.api.llm_datadist import LLMDataDist
from datadist.status import LLMException, LLMStatusCode, Status
from datadist.types import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LLMClusterInfo,
    LLMRole,
    MemInfo,
    Memtype,
    Placement,
    RegisterMemStatus,
)

__all__ = [
    "BlocksCacheKey",
    "Cache",
    "CacheDesc",
    "CacheKey",
    "CacheKeyByIdAndIndex",
    "DataType",
    "LLMClusterInfo",
    "LLMConfig",
    "LLMDataDist",
    "LLMException",
    "LLMRole",
    "LLMStatusCode",
    "LlmConfig",
    "MemInfo",
    "Memtype",
    "Placement",
    "RegisterMemStatus",
    "Status",
]

os.environ.setdefault("AUTO_USE_UC_MEMORY", "0")

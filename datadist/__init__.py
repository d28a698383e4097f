"""LLM-DataDist API: link clusters and move KV caches, over interchangeable transports."""

import os
from typing import TYPE_CHECKING

from datadist.api.cache import Cache
from datadist.api.config import LLMConfig, LlmConfig
from datadist.api.dtypes import data_type_of, numpy_dtype_of, torch_dtype_of
from datadist.api.grant import Grant
from datadist.api.kv_cache import KvCache
from datadist.api.llm_datadist import LLMDataDist
from datadist.api.shared_arrays import empty
from datadist.api.tasks import (
    CacheTask,
    LayerSynchronizer,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from datadist.api.transfer_task import TransferTask
from datadist.drop_in import install_as_llm_datadist
from datadist.grants.state import GrantState
from datadist.links.events import LinkEvent, LinkEventKind
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
    ReceivedMessage,
    RegisterMemStatus,
)

__all__ = [
    "BlocksCacheKey",
    "Cache",
    "CacheDesc",
    "CacheKey",
    "CacheKeyByIdAndIndex",
    "CacheTask",
    "DataType",
    "Grant",
    "GrantState",
    "KvCache",
    "LLMClusterInfo",
    "LLMConfig",
    "LLMDataDist",
    "LLMException",
    "LLMRole",
    "LLMStatusCode",
    "LayerSynchronizer",
    "LinkEvent",
    "LinkEventKind",
    "LlmConfig",
    "MemInfo",
    "Memtype",
    "Placement",
    "ReceivedMessage",
    "RegisterMemStatus",
    "Status",
    "TransferConfig",
    "TransferTask",
    "TransferWithCacheKeyConfig",
    "data_type_of",
    "empty",
    "install_as_llm_datadist",
    "numpy_dtype_of",
    "torch_dtype_of",
]

os.environ.setdefault("AUTO_USE_UC_MEMORY", "0")

__version__: str


if not TYPE_CHECKING:  # to a type checker every name would be an attribute

    def __getattr__(name):
        """Look for the version at its first use: that reads the metadata of the installation."""
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from datadist.base.version import own_version

        return own_version()

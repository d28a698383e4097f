"""The datadist engine of one worker."""

from __future__ import annotations

import json
import secrets

import torch
from torch.utils.dlpack import from_dlpack
from vllm.logger import init_logger

from datadist import DataType, LLMConfig, LLMDataDist, LLMRole
from datadist_vllm.parameters import RankAddress
from datadist_vllm.settings import Settings

logger = init_logger(f"vllm.{__name__}")

POOL_EXTRA = 2 << 20
"""Bytes of the pool beyond the KV cache, for rounding."""


class WorkerEngine:
    """Starts the engine when its pool's size is known; listens at a free port."""

    def __init__(self, settings: Settings, metadata: bytes) -> None:
        self._settings = settings
        self._metadata = metadata
        self.engine = LLMDataDist(LLMRole.MIX, secrets.randbits(63) | 1)
        self.address: RankAddress | None = None

    def start(self, pool_bytes: int = 0, device: int | None = None) -> None:
        """Raise LLMException where the engine cannot start. ``device``: the one with the KV cache."""
        self.engine.init(self._options(pool_bytes, device))
        place = self.engine.listen_address
        assert place is not None
        self.address = RankAddress(self.engine.cluster_id, *place)

    def allocate(self, size: int) -> torch.Tensor:
        """Start with a pool for ``size`` bytes, and give them."""
        self.start(size + POOL_EXTRA)
        memory = self.engine.cache_manager.allocate_tensor([size], DataType.DT_INT8)
        tensor: torch.Tensor = from_dlpack(memory)
        return tensor

    def _options(self, pool_bytes: int, device: int | None) -> dict[str, str]:
        config = LLMConfig()
        config.enable_cache_manager = True
        config.listen_ip_info = f"{self._settings.listen_host}:0"  # a free port
        config.link_metadata = self._metadata
        if self._settings.backend:
            config.transfer_backend = self._settings.backend
        if device is not None:
            config.device_id = device
        if pool_bytes:
            config.mem_pool_cfg = json.dumps({"memory_size": pool_bytes})
        options: dict[str, str] = config.generate_options()
        return options

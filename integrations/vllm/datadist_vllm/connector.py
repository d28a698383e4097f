"""`DataDistConnector`: hands vLLM's calls to the two halves."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import vllm
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from datadist_vllm.groups import groups_of
from datadist_vllm.messages import StepMetadata, WorkerAddress
from datadist_vllm.metrics import DataDistPromMetrics, DataDistStats
from datadist_vllm.scheduler import SchedulerHalf
from datadist_vllm.settings import Settings
from datadist_vllm.versions import check_vllm_version
from datadist_vllm.worker import WorkerHalf

if TYPE_CHECKING:
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class DataDistConnector(KVConnectorBase_V1, SupportsHMA):
    """Moves KV caches between vLLM instances with datadist; decoders pull what prefillers grant."""

    _cache_hit_source = CacheHitSource.P2P

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        check_vllm_version(vllm.__version__)
        super().__init__(vllm_config, role, kv_cache_config)
        settings = Settings.parse(self._kv_transfer_config.kv_connector_extra_config)
        groups = groups_of(kv_cache_config)
        _check_parallel(vllm_config)
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        if role is KVConnectorRole.SCHEDULER:
            engine_id = str(self._kv_transfer_config.engine_id)
            self._scheduler = SchedulerHalf(engine_id, groups, settings)
        else:
            self._worker = WorkerHalf(vllm_config, kv_cache_config, settings)

    # -- of both -------------------------------------------------------------------------------

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """Heads outside of tokens: a rank's heads are one piece of a block. MLA has no heads."""
        if vllm_config.model_config is None or vllm_config.model_config.use_mla:
            return None
        return "LBHNC"

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """What this half has counted since the last call."""
        half = self._worker if self._worker is not None else self._scheduler
        assert half is not None
        return half.stats()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats:
        """Counts that came from another process."""
        return DataDistStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        """For vLLM's ``/metrics``."""
        return DataDistPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        """The process ends."""
        if self._worker is not None:
            self._worker.shutdown()

    # -- scheduler half ------------------------------------------------------------------------

    @property
    def _scheduling(self) -> SchedulerHalf:
        assert self._scheduler is not None, "vLLM called the worker half as the scheduler half"
        return self._scheduler

    def set_xfer_handshake_metadata(
        self, metadata: dict[int, KVConnectorHandshakeMetadata]
    ) -> None:
        """The addresses of the workers, by rank."""
        addresses = [each for _, each in sorted(metadata.items())]
        self._scheduling.set_ranks(
            [each.address for each in addresses if isinstance(each, WorkerAddress)]
        )

    def get_loaded_kv_cache_group_ids(self, request: Request) -> tuple[int, ...]:
        """A load restores every group."""
        ids: tuple[int, ...] = self._kv_cache_config.transfer_group_ids
        return ids

    def on_new_request(self, request: Request) -> None:
        """See `SchedulerHalf.on_new_request`."""
        self._scheduling.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """See `SchedulerHalf.matched_tokens`."""
        return self._scheduling.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """See `SchedulerHalf.after_alloc`."""
        self._scheduling.after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """See `SchedulerHalf.build_meta`."""
        return self._scheduling.build_meta(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """See `SchedulerHalf.received`."""
        self._scheduling.received(
            connector_output.finished_recving or set(), connector_output.failed_recving or set()
        )

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """See `SchedulerHalf.finished`."""
        return self._scheduling.finished(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: Sequence[list[int]]
    ) -> tuple[bool, dict[str, Any] | None]:
        """See `SchedulerHalf.finished`."""
        return self._scheduling.finished(request, block_ids)

    # -- worker half ---------------------------------------------------------------------------

    @property
    def _working(self) -> WorkerHalf:
        assert self._worker is not None, "vLLM called the scheduler half as the worker half"
        return self._worker

    def get_mem_pool_context(self) -> AbstractContextManager[object] | None:
        """See `WorkerHalf.pool_context`."""
        return self._working.pool_context()

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """See `WorkerHalf.register`."""
        self._working.register(kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """See `WorkerHalf.address`."""
        return self._working.address()

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Called before each forward, also where there is nothing to compute."""
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepMetadata)
        self._working.before_forward(connector_metadata)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """See `WorkerHalf.start_loads`."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        self._working.start_loads(metadata, idle=forward_context.attn_metadata is None)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are asynchronous: a request is scheduled once all of its layers are here."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None:
        """Nothing is saved: readers read vLLM's cache."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """See `WorkerHalf.results`."""
        return self._working.results()


def _check_parallel(config: VllmConfig) -> None:
    """Raise ``NotImplementedError`` for ways of splitting a model that are not handled."""
    parallel = config.parallel_config
    for name in (
        "pipeline_parallel_size",
        "prefill_context_parallel_size",
        "decode_context_parallel_size",
    ):
        if getattr(parallel, name) != 1:
            raise NotImplementedError(
                f"DataDistConnector does not handle {name} = {getattr(parallel, name)}: use 1"
            )

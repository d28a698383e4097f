"""The worker half: one per tensor-parallel rank, with one datadist engine."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheConfig

from datadist import GrantState
from datadist_vllm import renewals
from datadist_vllm.amx import permit_amx
from datadist_vllm.engine import WorkerEngine
from datadist_vllm.fingerprint import encode, fingerprint
from datadist_vllm.granting import Grants
from datadist_vllm.links import Links
from datadist_vllm.messages import StepMetadata, WorkerAddress
from datadist_vllm.metrics import BYTES, FAILURES, LAPSED, LOST, SECONDS, DataDistStats
from datadist_vllm.pool import PoolAllocation
from datadist_vllm.ranks import Split, readers_of
from datadist_vllm.reading import Reading
from datadist_vllm.regions import regions_of
from datadist_vllm.settings import Settings

logger = init_logger(f"vllm.{__name__}")

IDLE_SECONDS = 0.002
"""How long a step that computes nothing waits for the end of a load. vLLM asks again after a
millisecond and the time of a step, and a request that comes meanwhile waits so long."""


class WorkerHalf:
    """Runs in a worker's process; used by vLLM's thread only."""

    def __init__(self, config: VllmConfig, kv_cache: KVCacheConfig, settings: Settings) -> None:
        self._config = config
        self._kv_cache = kv_cache
        self._settings = settings
        permit_amx()
        self._rank, self._split = get_tensor_model_parallel_rank(), self._own_split()
        self._shared = fingerprint(config, kv_cache)
        self._engine = WorkerEngine(settings, encode(self._shared, asdict(self._split)))
        self._pool: PoolAllocation | None = None
        self._stats = DataDistStats()
        self._idle = False
        """Whether the step computes nothing."""

    # -- start and end -------------------------------------------------------------------------

    def pool_context(self) -> AbstractContextManager[object] | None:
        """What vLLM allocates its KV cache in."""
        if not self._settings.pool or current_platform.device_type != "cpu":
            return None
        self._pool = PoolAllocation(self._engine.allocate)
        return self._pool

    def register(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The KV cache exists: make it known, and start all parts."""
        if self._pool is not None and not self._pool.used:
            raise RuntimeError(
                "vLLM did not allocate its KV cache as 0.32 does: set "
                '"pool": false in kv_connector_extra_config to register its memory instead'
            )
        if self._engine.address is None:
            self._engine.start(device=next(iter(tensors.values())).device.index)
        engine, settings = self._engine.engine, self._settings
        regions = regions_of(self._kv_cache, tensors, engine)
        rank, split = self._rank, self._split
        for region in regions:
            region.cache(split.parts)
        self._links = Links(engine, settings.listen_host, self._shared, settings.link_seconds)
        self._reading = Reading(engine, self._links, regions, rank, split, settings.pull_seconds)
        self._grants = Grants(engine, regions, split.parts, self._readers(rank, split))
        logger.info(
            "rank %d: cluster %d listens at %s:%d, backend %s, KV cache %s",
            rank,
            engine.cluster_id,
            settings.listen_host,
            self._engine.address.port if self._engine.address else 0,
            engine.backend,
            "in a pool" if self._pool else "registered",
        )

    def address(self) -> WorkerAddress | None:
        """For the scheduler half."""
        return None if self._engine.address is None else WorkerAddress(self._engine.address)

    def shutdown(self) -> None:
        """End all threads and links; peers hear of it."""
        if self._engine.address is not None:
            self._links.close()
            self._engine.engine.finalize()

    def _shards(self, ranks: int) -> int:
        """How many different shards of the KV cache so many ranks have."""
        model = self._config.model_config
        return 1 if model.use_mla else min(ranks, int(model.get_total_num_kv_heads()))

    def _own_split(self) -> Split:
        ranks = self._config.parallel_config.tensor_parallel_size
        shards = self._shards(ranks)
        readers = self._shards(max(ranks, self._settings.peer_tensor_parallel_size))
        return Split(ranks, shards, readers // shards)

    def _readers(self, rank: int, split: Split) -> int:
        ranks = self._settings.peer_tensor_parallel_size or split.ranks
        return readers_of(rank, split, ranks, self._shards(ranks))

    # -- steps ---------------------------------------------------------------------------------

    def before_forward(self, step: StepMetadata) -> None:
        """Blocks that were freed are closed before this step writes to them; new ones are granted."""
        for request_id in step.revokes:
            self._grants.revoke(request_id)
        for granting in step.grants:
            self._grants.grant(granting)
        for finished in step.finished:
            self._grants.finish(finished)

    def start_loads(self, step: StepMetadata, idle: bool) -> None:
        """Begin and end loads; waits for none. ``idle``: the step computes nothing."""
        self._idle = idle
        for source in step.releases:
            self._reading.release(source)
        for request_id in step.cancels:
            self._reading.cancel(request_id)
        for load in step.loads:
            self._reading.begin(load)
        self._reading.renew(step.renewals)
        self._links.tidy()

    def results(self) -> KVConnectorTransferResults:
        """What has ended since the last step."""
        for message in self._engine.engine.messages():
            for key in renewals.decode(message.data):
                self._grants.renew(key)
        if self._idle:
            self._reading.wait(IDLE_SECONDS)
        results = KVConnectorTransferResults(finished_sending=self._grants.ended())
        self._count_ends()
        for result in self._reading.ended():
            request_id, source = result.load.request_id, result.load.source
            results.finished_recving.add(request_id)
            if result.error is None:
                self._stats.data[SECONDS].append(result.seconds)
                self._stats.count(BYTES, result.bytes)
                logger.info(
                    "request %s: %d tokens (%.1f MiB) came from %s over %s in %.1f ms",
                    request_id, result.load.tokens, result.bytes / 2**20, source.engine_id,
                    result.transport, result.seconds * 1000,
                )  # fmt: skip
                continue
            results.failed_recving.add(request_id)
            if not result.cancelled:
                self._stats.count(FAILURES, 1)
                logger.warning(
                    "request %s: its blocks did not come from %s over %s: %s",
                    request_id, source.engine_id, result.transport, result.error,
                )  # fmt: skip
        return results

    def _count_ends(self) -> None:
        ends = self._grants.ends
        self._stats.count(LAPSED, ends.pop(GrantState.LAPSED, 0))
        self._stats.count(LOST, ends.pop(GrantState.READER_LOST, 0))
        ends.clear()

    def stats(self) -> DataDistStats | None:
        """What was counted since the last step."""
        return self._stats.taken()

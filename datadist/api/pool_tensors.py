"""The cache manager's part that gives tensors over pool memory, which caches are then made from."""

from __future__ import annotations

import os
from collections.abc import Sequence

from datadist.api.arguments import tensor_size
from datadist.api.arrays import CacheTensor
from datadist.api.manager_mixin import ManagerMixin
from datadist.base.calls import begin, entries
from datadist.base.keywords import named_keywords
from datadist.caches.block_ranges import BlockRanges
from datadist.caches.memory import Memory
from datadist.caches.pool import Run
from datadist.engine.engine import Engine
from datadist.status import param_invalid
from datadist.types import ARRAY_TYPES, CacheDesc, DataType, Placement, fixed


class _Pages:
    """Pages of a pool, which return once nothing refers to this: tensors and views of them do."""

    def __init__(self, memory: Memory, placement: Placement, keeper: object) -> None:
        self._memory = memory
        self._placement = placement
        self._keeper = keeper
        """Of the mapping, for views that outlive the engine."""
        self.runs: list[Run] = []
        self.ranges: BlockRanges | None = None
        self._pid = os.getpid()

    def __del__(self) -> None:
        if self.runs and os.getpid() == self._pid:  # a forked child has no part in the pool
            _give_back(self._memory, self._placement, self.runs, self.ranges)


def _give_back(
    memory: Memory, placement: Placement, runs: list[Run], ranges: BlockRanges | None
) -> None:
    """At once, or once no transfer that could not be stopped may touch them any more."""

    def again() -> None:
        _give_back(memory, placement, runs, ranges)

    if ranges is None or not memory.quarantine.defers(ranges, again):
        memory.give_back(placement, id(runs), runs)


@named_keywords
@entries
class PoolTensors(ManagerMixin):
    """Tensors over memory of the pools."""

    def allocate_tensor(
        self,
        shape: Sequence[int],
        data_type: DataType,
        placement: Placement = Placement.DEVICE,
    ) -> CacheTensor:
        """A tensor over memory of the pool of that placement, for a program's own KV cache.

        ``torch.from_dlpack(tensor)`` and ``tensor.numpy()`` share the memory; caches are made from
        those, or parts of them, by :meth:`register_blocks_cache`. Peers reach such caches as those
        that were allocated, also through links that were made before. It holds what was in the pool
        before; a fresh pool is zeroed. The memory returns to the pool with the last tensor or view of
        it, and not before caches over it are unregistered.

        Raises ``TypeError``, ``ValueError``, LLMException: LLM_PARAM_INVALID without a pool, for bad
        dimensions, types without arrays and memory that the CPU cannot address; LLM_OUT_OF_MEMORY.
        """
        begin("allocate_tensor")
        desc = fixed(CacheDesc(1, shape, data_type, placement))
        if data_type not in ARRAY_TYPES:
            raise param_invalid(f"data_type is {data_type}, which has no array type")
        engine = self._engine()
        _check_pool(engine, placement)
        size = tensor_size(desc)
        _, region = engine.memory.pool_region(placement)
        pages = _Pages(engine.memory, placement, region.keeper)
        (address,) = engine.memory.allocate(placement, [size], pages.runs)
        pages.ranges = BlockRanges((address,), size)
        return CacheTensor(address, tuple(desc.shape), data_type, pages)


def _check_pool(engine: Engine, placement: Placement) -> None:
    if not engine.memory.has_pool(placement):
        option = "mem_pool_cfg" if placement is Placement.DEVICE else "host_mem_pool_cfg"
        raise param_invalid(f"no {placement.name} pool is configured: set {option} before init")
    if placement not in engine.transport.capabilities.host_addressable:
        raise param_invalid(
            f"the {placement.name} pool of backend {engine.backend.name} lies in memory of the device, "
            "which has no tensors here: allocate a cache, and use its addresses"
        )

"""The cache manager's part that transfers layer by layer while the caller computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index as as_index

import numpy as np

from datadist import checks
from datadist.api.arguments import cluster_of, source_of
from datadist.api.cache import Cache, id_in, made_with
from datadist.api.manager_part import ManagerPart
from datadist.api.tasks import (
    CacheTask,
    LayerSynchronizer,
    TransferConfig,
    TransferWithCacheKeyConfig,
    check_uint64s,
)
from datadist.engine.engine import Engine
from datadist.engine.layerwise import LayerJob, LayerSend
from datadist.engine.owned import Layout
from datadist.engine.plan import (
    Bases,
    Blocks,
    Segments,
    check_blocks,
    plan_blocks,
    plan_scatter,
    plan_slots,
)
from datadist.engine.push import PushLayers
from datadist.engine.resolve import ById, slots_of
from datadist.engine.transfer import as_param_invalid
from datadist.keywords import named_keywords
from datadist.status import param_invalid
from datadist.types import Placement

PER_LAYER = 2
"""Tensors of a layer here, always (LLM-DataDist API, transfer_cache_async)."""


@dataclass(frozen=True)
class _Blocks:
    """Block indices as given; ``nbytes`` is 0 where the size of a remote block was not given."""

    source: Blocks | None
    target: Blocks | None
    nbytes: int


@named_keywords
class LayerWise(ManagerPart):
    """Asynchronous transfers."""

    def transfer_cache_async(
        self,
        src_cache: Cache,
        layer_synchronizer: LayerSynchronizer,
        transfer_configs: Sequence[TransferConfig] | Sequence[TransferWithCacheKeyConfig],
        src_block_indices: Blocks | None = None,
        dst_block_indices: Blocks | None = None,
        dst_block_memory_size: int | None = None,
    ) -> CacheTask:
        """Send layers (2 tensors each) of a DEVICE cache to every destination, as they are final.

        Returns at once. Per layer, in ascending order: ``synchronize_layer(layer, None)``, then the
        transfer, which overlaps with the next layer's ``synchronize_layer``. Each transfer of a
        layer may take ``sync_kv_timeout``; the first failure ends the task.

        What moves: without block lists one slot of a contiguous cache (``src_batch_index``), or
        whole tensors of a blocks cache; with ``dst_block_indices`` alone a slot spread over blocks
        of ``dst_block_memory_size`` bytes; with both lists ``src_block_indices[i]`` to
        ``dst_block_indices[i]``; the lists may be NumPy arrays of integers. Destinations are
        :class:`TransferWithCacheKeyConfig` in one-sided mode and :class:`TransferConfig` otherwise,
        whose cluster then reads the layer itself. Element types that differ are a warning, or with
        ``datadist.check_types`` the result LLM_PARAM_INVALID.

        Raises ``TypeError``, ``ValueError``, LLMException: LLM_PARAM_INVALID, LLM_KV_CACHE_NOT_EXIST
        for a cache of an engine that was finalized; what fails later is a result of the task.
        """
        checks.check_isinstance("src_cache", src_cache, Cache, allow_none=False)
        if made_with(src_cache).placement is Placement.HOST:
            raise param_invalid(f"{src_cache!r} has placement HOST, only support DEVICE sources")
        blocks = _check_blocks(src_block_indices, dst_block_indices, dst_block_memory_size)
        checks.check_isinstance(
            "layer_synchronizer", layer_synchronizer, LayerSynchronizer, allow_none=False
        )
        kind = TransferWithCacheKeyConfig if self._one_sided else TransferConfig
        checks.check_sequence_of("transfer_configs", transfer_configs, kind)
        _check_fit(src_cache, transfer_configs, blocks)
        engine = self._engine()
        id_in(src_cache, self)
        sends = [_send(engine, src_cache, config, blocks) for config in transfer_configs]
        return CacheTask(
            LayerJob(sends, lambda layer: layer_synchronizer.synchronize_layer(layer, None))
        )


def _check_blocks(source: Blocks | None, target: Blocks | None, nbytes: int | None) -> _Blocks:
    target = _kept("dst_block_indices", target)
    source = _kept("src_block_indices", source)
    if nbytes is not None:
        checks.check_uint64("dst_block_memory_size", nbytes)
    if source is not None and target is None:
        raise param_invalid("src_block_indices needs dst_block_indices")
    if source is not None and target is not None and len(source) != len(target):
        raise param_invalid(
            f"src_block_indices has {len(source)} entries and dst_block_indices {len(target)}"
        )
    if source is None and target is not None and nbytes is None:
        raise param_invalid("dst_block_indices alone needs dst_block_memory_size, in bytes")
    return _Blocks(source, target, nbytes or 0)


def _kept(name: str, blocks: Blocks | None) -> Blocks | None:
    """A copy of indices, checked: the caller may use its list again while the task runs."""
    if blocks is None:
        return None
    checks.check_blocks(name, blocks)
    if not isinstance(blocks, np.ndarray):
        plain = [as_index(block) for block in blocks]
        check_uint64s(name, plain)
        return plain
    if blocks.size and blocks.min() < 0:
        check_uint64s(name, blocks.tolist())
    return blocks.copy()


def _check_fit(
    cache: Cache,
    configs: Sequence[TransferConfig] | Sequence[TransferWithCacheKeyConfig],
    blocks: _Blocks,
) -> None:
    if blocks.target is None and blocks.nbytes:
        raise param_invalid(f"dst_block_memory_size is {blocks.nbytes} without dst_block_indices")
    if made_with(cache).num_tensors % PER_LAYER:
        raise param_invalid(f"{cache!r} has an odd number of tensors: a layer has 2")
    for config in configs:
        _check_config(cache, config, blocks)


def _check_config(
    cache: Cache, config: TransferConfig | TransferWithCacheKeyConfig, blocks: _Blocks
) -> None:
    layers = made_with(cache).num_tensors // PER_LAYER
    if config.src_layer_range is None:
        config.src_layer_range = range(layers)
    if blocks.source is not None and config.src_batch_index != 0:
        raise param_invalid(
            f"src_batch_index is {config.src_batch_index}, it must be 0 with src_block_indices"
        )
    if config.src_layer_range.stop > layers:
        raise param_invalid(
            f"src_layer_range is {config.src_layer_range}: there are {layers} layers"
        )
    if isinstance(config, TransferConfig):
        expected = PER_LAYER * len(config.src_layer_range)
        if len(config.dst_addrs) != expected:
            raise param_invalid(
                f"dst_addrs has {len(config.dst_addrs)} entries: {len(config.src_layer_range)} layers "
                f"need {expected}"
            )


def _send(
    engine: Engine,
    cache: Cache,
    config: TransferConfig | TransferWithCacheKeyConfig,
    blocks: _Blocks,
) -> LayerSend:
    layers = config.src_layer_range
    assert layers is not None
    if isinstance(config, TransferConfig):
        move = _fetch_move(engine, cache, config, blocks)
    else:
        move = _push_move(engine, cache, config, blocks)
    return LayerSend(layers, move, f"cluster {config.dst_cluster_id}")


def _push_move(
    engine: Engine, cache: Cache, config: TransferWithCacheKeyConfig, blocks: _Blocks
) -> Callable[[int], None]:
    """Writes one layer into the cache that the config names (one-sided mode)."""
    key, cluster, target = (
        config.cache_key,
        cluster_of(config.cache_key),
        source_of(config.cache_key),
    )
    slot, shift = (
        config.src_batch_index,
        config.dst_layer_range.start - config.src_layer_range.start,
    )

    def move(layer: int) -> None:
        at = layer + shift
        layers = PushLayers(range(layer, layer + 1), range(at, at + 1), PER_LAYER)
        if blocks.source is not None and blocks.target is not None:
            _check_source_blocks(cache, blocks)
            engine.pushes.push_blocks(
                cluster, target, cache.cache_id, blocks.source, blocks.target, layers
            )
        elif blocks.target is not None:
            _check_spread(cache, blocks)
            engine.pushes.push_slot_to_blocks(
                cluster, target, cache.cache_id, slot, blocks.target, blocks.nbytes, layers
            )
        elif cache.is_blocks_cache:
            engine.pushes.push_whole(cluster, target, cache.cache_id, layers)
        elif isinstance(target, ById):
            engine.pushes.push_cache(cluster, target, cache.cache_id, slot, layers)
        else:
            raise param_invalid(
                f"{key!r} names a blocks cache and {cache!r} is contiguous: give dst_block_indices"
            )

    return move


def _fetch_move(
    engine: Engine, cache: Cache, config: TransferConfig, blocks: _Blocks
) -> Callable[[int], None]:
    """Has the destination read one layer to the addresses of the config (two-sided mode)."""
    assert config.src_layer_range is not None
    first = config.src_layer_range.start
    addresses, slot, cluster = config.dst_addrs, config.src_batch_index, config.dst_cluster_id

    def move(layer: int) -> None:
        deadline = time.monotonic() + engine.transfers.timeout
        at = PER_LAYER * (layer - first)
        if cluster == engine.cluster_id:
            raise param_invalid(
                f"dst_cluster_id is {cluster}, which is this engine: name another one, or use "
                "copy_cache or copy_blocks"
            )
        with engine.owned.pinned(cache.cache_id) as own:
            mine = own.layout.bases[PER_LAYER * layer : PER_LAYER * (layer + 1)]
            theirs = addresses[at : at + PER_LAYER]
            _check_slot(slot, cache.cache_id, own.layout)
            with as_param_invalid():
                segments = _fetched(cache, own.layout, slot, blocks, mine, theirs)
            engine.fetches.send(cluster, segments, own.layout.data_type, deadline)

    return move


def _check_slot(slot: int, cache_id: int, layout: Layout) -> None:
    if layout.blocks and slot:
        raise param_invalid(f"src_batch_index is {slot}: it must be 0 with a blocks cache")
    if slot >= layout.count:
        raise param_invalid(f"src_batch_index is {slot}: {slots_of(cache_id, layout.count)}")


def _fetched(
    cache: Cache, layout: Layout, slot: int, blocks: _Blocks, mine: Bases, theirs: Bases
) -> Segments:
    """What the destination reads of these tensors of ours, to where in its own."""
    stride = layout.stride
    if blocks.source is not None and blocks.target is not None:
        _check_source_blocks(cache, blocks)
        sources = check_blocks("src_block_indices", blocks.source, layout.count)
        return plan_blocks(mine, theirs, sources, blocks.target, stride, stride, stride)
    if blocks.target is not None:
        _check_spread(cache, blocks)
        spread = plan_scatter(theirs, mine, blocks.target, blocks.nbytes, slot * stride, stride)
        return Segments(spread.remote, spread.local, spread.length, spread.nbytes)
    return plan_slots(
        mine, theirs, slot * stride, 0, layout.tensor_size if layout.blocks else stride
    )


def _check_source_blocks(cache: Cache, blocks: _Blocks) -> None:
    if not cache.is_blocks_cache:
        raise param_invalid(f"src_block_indices needs a blocks cache, not {cache!r}")
    desc = made_with(cache)
    stride = desc.size // desc.shape[0]
    if blocks.nbytes and blocks.nbytes != stride:
        raise param_invalid(
            f"dst_block_memory_size is {blocks.nbytes}: blocks of {cache!r} hold {stride} bytes"
        )


def _check_spread(cache: Cache, blocks: _Blocks) -> None:
    if cache.is_blocks_cache:
        raise param_invalid(f"dst_block_indices needs src_block_indices with {cache!r}")
    size = made_with(cache).size
    if not 0 < blocks.nbytes < size:
        raise param_invalid(
            f"dst_block_memory_size is {blocks.nbytes}, it must be in [1, {size - 1}] for {cache!r}"
        )

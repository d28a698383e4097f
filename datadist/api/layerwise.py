"""The cache manager's part that transfers layer by layer while the caller computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from datadist.api.arguments import cluster_of, source_of
from datadist.api.cache import Cache, desc_at_creation, own_cache_id
from datadist.api.call_options import seconds_of
from datadist.api.destinations import check_no_overlap
from datadist.api.layerwise_checks import (
    Config,
    LayerBlocks,
    Strides,
    bytes_of_block,
    check_fit,
    per_layer,
    take_blocks,
)
from datadist.api.manager_mixin import ManagerMixin
from datadist.api.tasks import (
    CacheTask,
    LayerSynchronizer,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from datadist.base import checks
from datadist.base.calls import begin, entries
from datadist.base.keywords import named_keywords
from datadist.caches.owned import Layout, OwnCache
from datadist.engine.engine import Engine
from datadist.status import LLMException, param_invalid, system_errors
from datadist.transfers.block_lists import Blocks
from datadist.transfers.cuts import cut
from datadist.transfers.layerwise import LayerJob, LayerSend
from datadist.transfers.limits import CallLimit
from datadist.transfers.plan import Bases, Segments, joined, plan_blocks, plan_scatter, plan_slots
from datadist.transfers.push import PushLayers
from datadist.transfers.resolve import ById
from datadist.transfers.transfer import as_param_invalid, check_accessible
from datadist.types import Placement


@named_keywords
@entries
class LayerWise(ManagerMixin):
    """Asynchronous transfers."""

    def transfer_cache_async(
        self,
        src_cache: Cache,
        layer_synchronizer: LayerSynchronizer,
        transfer_configs: Sequence[TransferConfig] | Sequence[TransferWithCacheKeyConfig],
        src_block_indices: Blocks | None = None,
        dst_block_indices: Blocks | None = None,
        dst_block_memory_size: int | None = None,
        *,
        timeout_in_millis: int | None = None,
    ) -> CacheTask:
        """Send layers of a DEVICE cache to every destination, as they are final.

        A layer has as many tensors as ``tensors_per_layer`` of the cache says, at both ends.

        Returns at once. Per layer, in ascending order: ``synchronize_layer(layer, milliseconds)``,
        then the transfer, which overlaps with the next layer's ``synchronize_layer``. Each transfer
        of a layer may take ``timeout_in_millis`` (1 to 2^31-1; None is ``sync_kv_timeout``); the first
        failure ends the task.

        What moves: without block lists one slot of a contiguous cache (``src_batch_index``), or
        whole tensors of a blocks cache; with ``dst_block_indices`` alone a slot spread over blocks
        of ``dst_block_memory_size`` bytes; with both lists ``src_block_indices[i]`` to
        ``dst_block_indices[i]``; the lists may be NumPy arrays of integers. No block is listed
        twice, and no byte of a destination is written twice. Destinations are
        :class:`TransferWithCacheKeyConfig` in one-sided mode and :class:`TransferConfig` otherwise,
        whose cluster then reads the layer itself. Element types that differ are a warning, or with
        ``datadist.check_types`` the result LLM_PARAM_INVALID.

        Raises ``TypeError``, ``ValueError``, LLMException: LLM_PARAM_INVALID,
        LLM_KV_CACHE_NOT_EXIST for a cache that was freed, LLM_ENGINE_FINALIZED, LLM_FAILED where no
        thread can be started. What only the destination knows, or what fails later, is a result of
        the task.
        """
        begin("transfer_cache_async")
        seconds = seconds_of(timeout_in_millis)
        checks.check_isinstance("src_cache", src_cache, Cache, allow_none=False)
        if desc_at_creation(src_cache).placement is Placement.HOST:
            raise param_invalid(f"{src_cache!r} has placement HOST, only support DEVICE sources")
        blocks = take_blocks(src_block_indices, dst_block_indices, dst_block_memory_size)
        checks.check_isinstance(
            "layer_synchronizer", layer_synchronizer, LayerSynchronizer, allow_none=False
        )
        kind = TransferWithCacheKeyConfig if self._one_sided else TransferConfig
        _check_mode(transfer_configs, self._one_sided)
        checks.check_sequence_of("transfer_configs", transfer_configs, kind)
        strides = self._strides(src_cache, transfer_configs, blocks)
        check_fit(src_cache, transfer_configs, blocks, strides)
        check_no_overlap(src_cache, transfer_configs, blocks, strides)
        engine = self._engine()
        self._check_source(engine, src_cache)
        sends = [
            self._send(engine, src_cache, config, blocks, strides, seconds)
            for config in transfer_configs
        ]
        limit = max(1, round((seconds or engine.transfers.timeout) * 1000))
        job = LayerJob(sends, lambda layer: layer_synchronizer.synchronize_layer(layer, limit))
        try:
            with system_errors("the transfer cannot begin"):
                engine.layer_jobs.begin(job)
            return CacheTask(job)
        except BaseException:
            job.cancel()  # its task is lost
            raise

    def _check_source(self, engine: Engine, cache: Cache) -> None:
        """The engine's record of the source. Raises LLM_KV_CACHE_NOT_EXIST, LLM_PARAM_INVALID."""

        def check(own: OwnCache) -> None:
            if self._one_sided:
                check_accessible(own)

        engine.owned.using(own_cache_id(cache, self), check)

    def _strides(self, cache: Cache, configs: Sequence[Config], blocks: LayerBlocks) -> Strides:
        """How far apart blocks at the addresses of configs lie, where that is more than they hold."""
        engine = self._bound
        if (
            engine is None
            or engine.over
            or not (cache.is_blocks_cache or blocks.target is not None)
        ):
            return {}
        nbytes = bytes_of_block(cache, blocks)
        wanted: dict[int, set[int]] = {}
        for config in configs:
            if isinstance(config, TransferConfig):
                wanted.setdefault(config.dst_cluster_id, set()).update(config.dst_addrs)
        return {
            cluster: engine.fetches.strides(cluster, addresses, nbytes)
            for cluster, addresses in wanted.items()
        }

    def _send(
        self,
        engine: Engine,
        cache: Cache,
        config: TransferConfig | TransferWithCacheKeyConfig,
        blocks: LayerBlocks,
        strides: Strides,
        seconds: float | None,
    ) -> LayerSend:
        layers = config.src_layer_range
        assert layers is not None
        if isinstance(config, TransferConfig):
            apart = strides.get(config.dst_cluster_id, {})
            inner = _fetch_move(engine, cache, config, blocks, apart, seconds)
        else:
            inner = _push_move(engine, cache, config, blocks, seconds)

        def move(layer: int) -> None:
            self._engine()
            try:
                inner(layer)
            except LLMException:
                self._engine()  # this is the cause, whatever the error says
                raise

        return LayerSend(layers, move, f"cluster {config.dst_cluster_id}")


def _push_move(
    engine: Engine,
    cache: Cache,
    config: TransferWithCacheKeyConfig,
    blocks: LayerBlocks,
    seconds: float | None,
) -> Callable[[int], None]:
    """Writes one layer into the cache that the config names (one-sided mode)."""
    cluster, target = cluster_of(config.cache_key), source_of(config.cache_key)
    engine.transfers.check_cluster(cluster)
    slot, shift = (
        config.src_batch_index,
        config.dst_layer_range.start - config.src_layer_range.start,
    )

    def move(layer: int) -> None:
        at, limit = layer + shift, CallLimit(seconds)
        layers = PushLayers(range(layer, layer + 1), range(at, at + 1), per_layer(cache), False)
        if blocks.source is not None and blocks.target is not None:
            engine.pushes.push_blocks(
                cluster, target, cache.cache_id, blocks.source, blocks.target, layers, limit
            )
        elif blocks.target is not None:
            engine.pushes.push_slot_to_blocks(
                cluster, target, cache.cache_id, slot, blocks.target, blocks.nbytes, layers, limit
            )
        elif cache.is_blocks_cache:
            engine.pushes.push_whole(cluster, target, cache.cache_id, layers, limit)
        else:
            assert isinstance(target, ById)
            engine.pushes.push_cache(cluster, target, cache.cache_id, slot, layers, limit)

    return move


def _fetch_move(
    engine: Engine,
    cache: Cache,
    config: TransferConfig,
    blocks: LayerBlocks,
    apart: Mapping[int, int],
    seconds: float | None,
) -> Callable[[int], None]:
    """Has the destination read one layer to the addresses of the config (two-sided mode)."""
    assert config.src_layer_range is not None
    first = config.src_layer_range.start
    addresses, slot = list(config.dst_addrs), config.src_batch_index
    cluster = config.dst_cluster_id
    if cluster == engine.cluster_id:
        raise param_invalid(
            f"dst_cluster_id is {cluster}, which is this engine: name another one, or use copy_cache "
            "or copy_blocks"
        )

    def move(layer: int) -> None:
        limit, per = CallLimit(seconds), per_layer(cache)
        at = per * (layer - first)
        nbytes = bytes_of_block(cache, blocks)

        def send(own: OwnCache) -> None:
            mine = own.layout.bases[per * layer : per * (layer + 1)]
            theirs = addresses[at : at + per]
            strides = [apart.get(address, nbytes) for address in theirs]
            with as_param_invalid():
                segments = [
                    _fetched(own.layout, slot, blocks, each, there, stride)
                    for each, there, stride in _alike(mine, theirs, strides)
                ]
            by_block = own.layout.blocks or blocks.target is not None
            cut_segments = cut(joined(segments), own.layout.cuts, ())
            known = sorted(set(strides)) if by_block else []
            engine.fetches.send(cluster, cut_segments, own.layout.data_type, known, limit)

        engine.owned.using(cache.cache_id, send)

    return move


def _alike(
    mine: Sequence[int], theirs: Sequence[int], strides: Sequence[int]
) -> Iterator[tuple[list[int], list[int], int]]:
    """The tensors of a layer, by the stride of their blocks at the destination."""
    for stride in dict.fromkeys(strides):
        places = [place for place, each in enumerate(strides) if each == stride]
        yield [mine[place] for place in places], [theirs[place] for place in places], stride


def _fetched(
    layout: Layout, slot: int, blocks: LayerBlocks, mine: Bases, theirs: Bases, their_stride: int
) -> Segments:
    """The segments that the destination reads: from our tensors to its addresses."""
    stride, nbytes = layout.stride, layout.block_bytes
    if blocks.source is not None and blocks.target is not None:
        return plan_blocks(mine, theirs, blocks.source, blocks.target, stride, their_stride, nbytes)
    if blocks.target is not None:
        spread = plan_scatter(
            theirs, mine, blocks.target, their_stride, blocks.nbytes, slot * stride, nbytes
        )
        return Segments(spread.remote, spread.local, spread.length, spread.nbytes)
    if not layout.blocks:
        return plan_slots(mine, theirs, slot * stride, 0, nbytes)
    every = range(layout.count)
    return plan_blocks(mine, theirs, every, every, stride, their_stride, nbytes)


def _check_mode(configs: object, one_sided: bool) -> None:
    """Raise ``TypeError`` for destinations of the other mode, with the option that decides."""
    other = TransferConfig if one_sided else TransferWithCacheKeyConfig
    needed = TransferWithCacheKeyConfig if one_sided else TransferConfig
    for place, config in enumerate(configs if isinstance(configs, (list, tuple)) else ()):
        if isinstance(config, other):
            raise TypeError(
                f"transfer_configs[{place}] is a {other.__name__}, only support {needed.__name__} while "
                f"enable_remote_cache_accessible is {'on' if one_sided else 'off'}"
            )

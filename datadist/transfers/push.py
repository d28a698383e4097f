"""Pushes: our caches into those of a linked cluster, in one-sided mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from datadist.caches.directory import KeyName
from datadist.caches.element_types import ElementTypes
from datadist.caches.owned import OwnCache, OwnDirectory
from datadist.status import param_invalid
from datadist.transfers import resolve
from datadist.transfers.block_lists import Blocks, check_blocks
from datadist.transfers.cuts import cut
from datadist.transfers.limits import CallLimit
from datadist.transfers.plan import Segments, plan_blocks, plan_scatter, plan_slots
from datadist.transfers.resolve import ById, Found, Route, Source, tensor_range
from datadist.transfers.route_cache import RouteCache
from datadist.transfers.transfer import (
    Transfers,
    as_param_invalid,
    check_accessible,
    check_entry_accessible,
)


@dataclass(frozen=True)
class PushLayers:
    """Which layers go where: ranges of equal length, of ``per_layer`` tensors each."""

    source: range
    target: range
    per_layer: int
    named: bool = True
    """Whether the caller named the number: else it is our cache's, and the peer's must be equal."""


class Pushes:
    """Writes into caches of linked clusters; every method works from any thread.

    One call moves all layers; it may take ``sync_kv_timeout`` per layer, or what ``limit`` says of the
    whole call.
    """

    def __init__(
        self,
        transfers: Transfers,
        owned: OwnDirectory,
        route_cache: RouteCache,
        types: ElementTypes,
    ) -> None:
        self._transfers = transfers
        self._owned = owned
        self._route_cache = route_cache
        self._types = types

    def push_cache(
        self, cluster: int, target: ById, cache_id: int, slot: int, layers: PushLayers,
        limit: CallLimit,
    ) -> None:  # fmt: skip
        """Write slot ``slot`` of our contiguous cache into the slot that ``target`` names.

        Raises LLMException with the status codes of ``CacheManager.push_cache``.
        """

        def push(pushing: _Pushing) -> None:
            local, entry = pushing.local, pushing.found.entry
            if entry.blocks:
                raise param_invalid(
                    f"cache {entry.cache_id} of cluster {cluster} is a blocks cache: use push_blocks"
                )
            theirs = pushing.theirs()
            if target.slot >= entry.count:
                has = resolve.slots_of(entry.cache_id, entry.count, cluster)
                raise param_invalid(f"batch_index is {target.slot}: {has}")
            mine = pushing.mine()
            _check_slot(local, slot)
            nbytes = local.layout.block_bytes
            if nbytes > entry.block_bytes:
                raise param_invalid(
                    f"a slot of cache {cache_id} holds {nbytes} bytes and one of cache "
                    f"{entry.cache_id} of cluster {cluster} {entry.block_bytes}: it does not fit"
                )
            pushing.move(
                plan_slots(
                    local.layout.bases[mine],
                    entry.bases[theirs],
                    slot * local.layout.stride,
                    target.slot * entry.stride,
                    nbytes,
                )
            )

        self._with_target(cluster, ById(target.cache_id, 0), cache_id, layers, limit, push)

    def push_blocks(
        self,
        cluster: int,
        target: Source,
        cache_id: int,
        src_blocks: Blocks,
        dst_blocks: Blocks,
        layers: PushLayers,
        limit: CallLimit,
    ) -> None:
        """Write ``src_blocks[i]`` of our blocks cache into ``dst_blocks[i]`` of the target's.

        Raises LLMException with the status codes of ``CacheManager.push_blocks``.
        """

        def push(pushing: _Pushing) -> None:
            local, entry = pushing.local, pushing.found.entry
            _check_blocks_lead_to_blocks(pushing)
            theirs = pushing.theirs()
            with as_param_invalid():
                targets = check_blocks("dst_blocks", dst_blocks, entry.count)
            mine = pushing.mine()
            _check_equal_blocks(pushing, cluster)
            with as_param_invalid():
                sources = check_blocks("src_blocks", src_blocks, local.layout.count)
                segments = plan_blocks(
                    local.layout.bases[mine],
                    entry.bases[theirs],
                    sources,
                    targets,
                    local.layout.stride,
                    entry.stride,
                    entry.block_bytes,
                )
            route = pushing.move(segments)
            whole = len(local.layout.bases) == len(entry.bases) == mine.stop - mine.start
            if isinstance(target, KeyName) and whole and mine == theirs:
                name = cluster, target.model, cache_id, layers.per_layer
                self._route_cache.remember(
                    name, local, entry, route, pushing.version, max(1, len(layers.source))
                )

        self._with_target(cluster, target, cache_id, layers, limit, push)

    def check_cache(self, cluster: int, cache_id: int, slot: int, layers: PushLayers) -> None:
        """Raise what :meth:`push_cache` raises for what this engine alone can tell."""

        def check(cache: OwnCache) -> None:
            check_accessible(cache)
            _tensors_of(cache, layers)
            _check_slot(cache, slot)

        self._transfers.check_cluster(cluster)
        self._owned.using(cache_id, check)

    def check_blocks(
        self, cluster: int, cache_id: int, src_blocks: Blocks, layers: PushLayers
    ) -> None:
        """Raise what :meth:`push_blocks` raises for what this engine alone can tell."""

        def check(cache: OwnCache) -> None:
            check_accessible(cache)
            _tensors_of(cache, layers)
            with as_param_invalid():
                check_blocks("src_blocks", src_blocks, cache.layout.count)

        self._transfers.check_cluster(cluster)
        self._owned.using(cache_id, check)

    def push_slot_to_blocks(
        self, cluster: int, target: Source, cache_id: int, slot: int, dst_blocks: Blocks,
        block_bytes: int, layers: PushLayers, limit: CallLimit,
    ) -> None:  # fmt: skip
        """Spread a slot of our contiguous cache over blocks of ``block_bytes`` of the target."""

        def push(pushing: _Pushing) -> None:
            local, entry = pushing.local, pushing.found.entry
            if not entry.blocks or entry.block_bytes != block_bytes:
                raise param_invalid(
                    f"dst_block_memory_size is {block_bytes}, but cache {entry.cache_id} of cluster "
                    f"{cluster} has {'blocks' if entry.blocks else 'slots'} of {entry.block_bytes} bytes"
                )
            if not 0 <= slot < local.layout.count:
                has = resolve.slots_of(cache_id, local.layout.count)
                raise param_invalid(f"src_batch_index is {slot}: {has}")
            with as_param_invalid():
                targets = check_blocks("dst_block_indices", dst_blocks, entry.count)
                theirs, mine = pushing.theirs(), pushing.mine()
                segments = plan_scatter(
                    entry.bases[theirs],
                    local.layout.bases[mine],
                    targets,
                    entry.stride,
                    block_bytes,
                    slot * local.layout.stride,
                    local.layout.block_bytes,
                )
            pushing.move(
                Segments(segments.remote, segments.local, segments.length, segments.nbytes)
            )

        self._with_target(cluster, target, cache_id, layers, limit, push)

    def push_whole(
        self, cluster: int, target: Source, cache_id: int, layers: PushLayers, limit: CallLimit
    ) -> None:
        """Write whole tensors of our cache over those of the target, which are equally large."""

        def push(pushing: _Pushing) -> None:
            _check_blocks_lead_to_blocks(pushing)
            layout, entry = pushing.local.layout, pushing.found.entry
            theirs, mine = pushing.theirs(), pushing.mine()
            size, their_size = layout.block_bytes * layout.count, entry.block_bytes * entry.count
            if size != their_size:
                raise param_invalid(
                    f"a tensor of cache {cache_id} holds {size} bytes and one of cache "
                    f"{entry.cache_id} of cluster {cluster} {their_size}: without block "
                    "indices whole tensors move, and they must be equal"
                )
            bases = layout.bases[mine]
            if layout.dense and entry.dense:
                pushing.move(plan_slots(bases, entry.bases[theirs], 0, 0, size))
                return
            _check_equal_blocks(pushing, cluster)
            every = range(layout.count)
            pushing.move(
                plan_blocks(
                    bases, entry.bases[theirs], every, every,
                    layout.stride, entry.stride, layout.block_bytes,
                )
            )  # fmt: skip

        self._with_target(cluster, target, cache_id, layers, limit, push)

    def _with_target(
        self,
        cluster: int,
        target: Source,
        cache_id: int,
        layers: PushLayers,
        limit: CallLimit,
        push: Callable[[_Pushing], None],
    ) -> None:
        self._transfers.check_cluster(cluster)

        def from_cache(cache: OwnCache) -> None:
            limit.begin(self._transfers.timeout * max(1, len(layers.source)))
            routes = self._transfers.routes(cluster, limit.deadline)
            check_accessible(cache)
            view = routes[0].view
            version = view.version

            def begun(token: int) -> None:
                found = resolve.look_up(view, target, limit, token)
                check_entry_accessible(found)
                resolve.check_agreed(cache, found.entry, layers.named, cluster)
                ways = resolve.reaching(routes, routes[0], found.entry)

                def move(planned: Segments) -> Route:
                    self._types.check_push(view, cache, found.entry)
                    segments = cut(planned, cache.layout.cuts, found.entry.cuts)
                    return self._transfers.move_over(
                        ways,
                        lambda cached: self._transfers.move(cached, segments, limit, write=True),
                    )

                push(_Pushing(cache, found, layers, version, move))

            view.pulling(begun)

        self._owned.using(cache_id, from_cache)


@dataclass(frozen=True)
class _Pushing:
    """A push that has begun: both caches, and how to move."""

    local: OwnCache
    found: Found
    layers: PushLayers
    version: int
    """Of the peer's directory, that says so."""
    move: Callable[[Segments], Route]
    """Writes, and says over which link."""

    def theirs(self) -> slice:
        """The target's tensors."""
        count = len(self.found.entry.bases)
        return tensor_range(
            self.layers.target, self.layers.per_layer, count, "dst_layer_range", "target's"
        )

    def mine(self) -> slice:
        """Our tensors."""
        return _tensors_of(self.local, self.layers)


def _tensors_of(cache: OwnCache, layers: PushLayers) -> slice:
    count, per = len(cache.layout.bases), layers.per_layer
    if count % per:
        raise param_invalid(
            f"the local cache has {count} tensors, not a multiple of tensor_num_per_layer {per}"
        )
    return tensor_range(layers.source, per, count, "src_layer_range", "local")


def _check_slot(cache: OwnCache, slot: int) -> None:
    if slot >= cache.layout.count:
        has = resolve.slots_of(cache.cache_id, cache.layout.count)
        raise param_invalid(f"src_batch_index is {slot}: {has}")


def layers_to_push(
    source: range | None, target: range | None, tensors: int, per_layer: int, named: bool = True
) -> PushLayers:
    """Ranges as given; None means all layers of the source. Raises LLM_PARAM_INVALID."""
    everything = range(tensors // per_layer)
    if not everything and (source is None or target is None):
        raise param_invalid(
            f"{tensors} tensors make no layer of {per_layer}: set tensor_num_per_layer to at most "
            f"{tensors}"
        )
    source = everything if source is None else source
    target = everything if target is None else target
    if len(source) != len(target):
        raise param_invalid(
            f"src_layer_range {source} and dst_layer_range {target} differ in length"
        )
    return PushLayers(source, target, per_layer, named)


def _check_equal_blocks(pushing: _Pushing, cluster: int) -> None:
    mine, entry = pushing.local.layout.block_bytes, pushing.found.entry
    if mine != entry.block_bytes:
        raise param_invalid(
            f"a block of cache {pushing.local.cache_id} holds {mine} bytes and one of cache "
            f"{entry.cache_id} of cluster {cluster} {entry.block_bytes}: they must be equal"
        )


def _check_blocks_lead_to_blocks(pushing: _Pushing) -> None:
    entry = pushing.found.entry
    if pushing.local.layout.blocks and not entry.blocks:
        raise param_invalid(
            f"cache {entry.cache_id} of the target has slots, not blocks: blocks go to blocks only"
        )

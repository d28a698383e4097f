"""Pulls: caches of linked clusters into our own (check, route, look up, plan, move, consume)."""

from __future__ import annotations

from collections.abc import Callable

from datadist.base.range_set import RangeSet
from datadist.caches.directory import KeyName
from datadist.caches.element_types import ElementTypes
from datadist.caches.owned import OwnCache, OwnDirectory
from datadist.caches.peers import PeerView
from datadist.control.messages import Consume
from datadist.status import param_invalid
from datadist.transfers import resolve
from datadist.transfers.block_lists import Blocks, check_blocks, check_destinations
from datadist.transfers.cuts import cut
from datadist.transfers.limits import CallLimit
from datadist.transfers.plan import Segments, plan_blocks, plan_scatter, plan_slots
from datadist.transfers.resolve import Found, Layers, Route, Source
from datadist.transfers.route_cache import RouteCache
from datadist.transfers.transfer import (
    Transfers,
    as_param_invalid,
    check_accessible,
    check_entry_accessible,
)

Planner = Callable[[OwnCache, Found, slice, slice], Segments]


class Pulls:
    """Reads from caches of linked clusters; every method works from any thread."""

    def __init__(
        self, transfers: Transfers, owned: OwnDirectory, route_cache: RouteCache, types: ElementTypes,
        one_sided: bool,
    ) -> None:  # fmt: skip
        self._transfers = transfers
        self._owned = owned
        self._route_cache = route_cache
        self._types = types
        self._one_sided = one_sided

    def pull_cache(
        self, cluster: int, source: Source, cache_id: int, slot: int, size: int, layers: Layers,
        limit: CallLimit,
    ) -> None:  # fmt: skip
        """Pull a slot of a contiguous cache into slot ``slot`` of ours; size -1 is our stride.

        Raises LLMException with the status codes of ``CacheManager.pull_cache``.
        """
        self._transfers.check_cluster(cluster)

        def pull(cache: OwnCache) -> None:
            _check_slot(cache, slot, size)
            nbytes = cache.layout.block_bytes if size == -1 else size

            def plan(local: OwnCache, found: Found, mine: slice, theirs: slice) -> Segments:
                return _plan_slot(local, found, mine, theirs, slot, nbytes)

            self._pull(cluster, source, cache, layers, plan, limit)

        self._owned.using(cache_id, pull)

    def pull_blocks(
        self,
        cluster: int,
        source: Source,
        cache_id: int,
        src_blocks: Blocks,
        dst_blocks: Blocks,
        layers: Layers,
        limit: CallLimit,
    ) -> None:
        """Pull into blocks of our blocks cache, from blocks or (no ``src_blocks``) from a slot.

        Raises LLMException with the status codes of ``CacheManager.pull_blocks``.
        """
        self._transfers.check_cluster(cluster)

        def pull(cache: OwnCache) -> None:
            targets = _check_blocks(cache, src_blocks, dst_blocks)

            def plan(local: OwnCache, found: Found, mine: slice, theirs: slice) -> Segments:
                if found.entry.blocks:
                    return plan_pairs(local, found, mine, theirs, targets, src_blocks)
                return _plan_scatter(local, found, mine, theirs, targets, src_blocks)

            route, found, version = self._pull(cluster, source, cache, layers, plan, limit)
            if isinstance(source, KeyName) and source.space == "blocks" and layers.all:
                name = cluster, source.model, cache_id
                self._route_cache.remember(name, cache, found.entry, route, version)

        self._owned.using(cache_id, pull)

    def check_cache(
        self, cluster: int, cache_id: int, slot: int, size: int, layers: Layers
    ) -> None:
        """Raise what :meth:`pull_cache` raises for what this engine alone can tell."""

        def check(cache: OwnCache) -> None:
            _check_slot(cache, slot, size)
            self._check_local(cache, layers)

        self._transfers.check_cluster(cluster)
        self._owned.using(cache_id, check)

    def check_blocks(
        self, cluster: int, cache_id: int, src_blocks: Blocks, dst_blocks: Blocks, layers: Layers
    ) -> None:
        """Raise what :meth:`pull_blocks` raises for what this engine alone can tell."""

        def check(cache: OwnCache) -> None:
            _check_blocks(cache, src_blocks, dst_blocks)
            self._check_local(cache, layers)

        self._transfers.check_cluster(cluster)
        self._owned.using(cache_id, check)

    def _check_local(self, cache: OwnCache, layers: Layers) -> None:
        resolve.check_local(layers, len(cache.layout.bases))
        if self._one_sided:
            check_accessible(cache)

    def _pull(
        self, cluster: int, source: Source, cache: OwnCache, layers: Layers, plan: Planner,
        limit: CallLimit,
    ) -> tuple[Route, Found, int]:  # fmt: skip
        """Returns what it found, and the version of the peer's directory that says so."""
        limit.begin(self._transfers.timeout)
        resolve.check_local(layers, len(cache.layout.bases))
        routes = self._transfers.routes(cluster, limit.deadline)
        if self._one_sided:
            check_accessible(cache)
        view = routes[0].view
        version = view.version

        def pull(token: int) -> tuple[Route, Found]:
            found = resolve.look_up(view, source, limit, token)
            if self._one_sided:
                check_entry_accessible(found)
            resolve.check_agreed(cache, found.entry, layers.named, cluster)
            mine, theirs = resolve.tensors_of(
                layers, len(cache.layout.bases), len(found.entry.bases)
            )
            planned = plan(cache, found, mine, theirs)
            segments = cut(planned, cache.layout.cuts, found.entry.cuts)
            self._types.check_pull(view, found.entry, cache)

            pulled: list[RangeSet] = []

            def move(route: Route) -> None:
                self._transfers.move(
                    route,
                    segments,
                    limit,
                    found.entry,
                    before=lambda: pulled.append(self._pulled_so_far(view, found, source)),
                    after=lambda: self._consume(view, found, theirs, source, pulled[-1]),
                )

            ways = resolve.reaching(routes, routes[0], found.entry)
            return self._transfers.move_over(ways, move), found

        return *view.pulling(pull), version

    def _consumes(self, found: Found) -> bool:
        binding = found.binding
        return (
            not self._one_sided
            and binding is not None
            and binding.space == "request"
            and found.entry.pooled
        )

    def _pulled_so_far(self, view: PeerView, found: Found, source: Source) -> RangeSet:
        """The tensors that were pulled by this key; all pulls of it that go on share the object.

        Raises where another thread has pulled it while this one waited for the link.
        """
        if found.binding is None:
            return RangeSet()
        with view.lock:
            again = resolve.find(view.directory, source, view.consumed)
            if again is None or again.binding is None or again.binding.id != found.binding.id:
                raise resolve.not_there(view, source)
            if not self._consumes(found):
                return RangeSet()
            return view.covered.setdefault(found.binding.id, RangeSet())

    def _consume(
        self, view: PeerView, found: Found, theirs: slice, source: Source, pulled: RangeSet
    ) -> None:
        """Raises where another thread has consumed the key while this one read as well."""
        binding, entry = found.binding, found.entry
        if binding is None or not self._consumes(found):
            return
        with view.lock:
            if pulled.is_all(len(entry.bases)):
                raise resolve.not_there(view, source)
            pulled.add(theirs.start, theirs.stop)
            if pulled.is_all(len(entry.bases)):
                view.consumed.add(binding.id)
                view.covered.pop(binding.id, None)
        view.send(
            Consume(
                cache_id=entry.cache_id, binding=binding.id, start=theirs.start, stop=theirs.stop
            )
        )


def _check_slot(cache: OwnCache, slot: int, size: int) -> None:
    layout = cache.layout
    if layout.blocks:
        raise param_invalid(f"cache {cache.cache_id} is a blocks cache: use pull_blocks")
    if slot >= layout.count:
        has = resolve.slots_of(cache.cache_id, layout.count)
        raise param_invalid(f"batch_index is {slot}: {has}")
    if size > layout.block_bytes:
        raise param_invalid(
            f"size is {size}: a slot of cache {cache.cache_id} holds {layout.block_bytes} bytes"
        )


def _check_blocks(cache: OwnCache, src_blocks: Blocks, dst_blocks: Blocks) -> Blocks:
    """The destinations, within the cache and each once."""
    if not cache.layout.blocks:
        raise param_invalid(f"cache {cache.cache_id} is not a blocks cache: use pull_cache")
    if len(src_blocks) not in (0, len(dst_blocks)):
        raise param_invalid(
            f"src_blocks has {len(src_blocks)} entries and dst_blocks {len(dst_blocks)}: "
            "each source block goes to the destination block at the same place"
        )
    with as_param_invalid():
        return check_destinations("dst_blocks", dst_blocks, cache.layout.count)


def _plan_slot(
    cache: OwnCache, found: Found, mine: slice, theirs: slice, slot: int, nbytes: int
) -> Segments:
    entry = found.entry
    if entry.blocks:
        raise param_invalid(
            f"the owner's cache {entry.cache_id} is a blocks cache, which cannot be pulled into a "
            "contiguous one: use pull_blocks with a blocks cache"
        )
    if nbytes > entry.block_bytes:
        raise param_invalid(
            f"{nbytes} bytes were asked for, a slot of the owner's cache {entry.cache_id} holds "
            f"{entry.block_bytes}: give size"
        )
    return plan_slots(
        cache.layout.bases[mine],
        entry.bases[theirs],
        slot * cache.layout.stride,
        found.slot * entry.stride,
        nbytes,
    )


def plan_pairs(
    cache: OwnCache,
    found: Found,
    mine: slice,
    theirs: slice,
    dst_blocks: Blocks,
    src_blocks: Blocks,
) -> Segments:
    """``src_blocks[i]`` of a blocks cache to ``dst_blocks[i]``. Raises LLM_PARAM_INVALID."""
    entry, block_bytes = found.entry, cache.layout.block_bytes
    if len(src_blocks) == 0:
        raise param_invalid(
            f"the owner's cache {entry.cache_id} is a blocks cache: src_blocks must list one block "
            "per entry of dst_blocks"
        )
    if entry.block_bytes != block_bytes:
        raise param_invalid(
            f"a block of the owner's cache {entry.cache_id} holds {entry.block_bytes} bytes and one of "
            f"cache {cache.cache_id} {block_bytes}: they must be equal"
        )
    with as_param_invalid():
        sources = check_blocks("src_blocks", src_blocks, entry.count)
        return plan_blocks(
            cache.layout.bases[mine],
            entry.bases[theirs],
            dst_blocks,
            sources,
            cache.layout.stride,
            entry.stride,
            block_bytes,
        )


def _plan_scatter(
    cache: OwnCache,
    found: Found,
    mine: slice,
    theirs: slice,
    dst_blocks: Blocks,
    src_blocks: Blocks,
) -> Segments:
    entry = found.entry
    if len(src_blocks):
        raise param_invalid(
            f"the owner's cache {entry.cache_id} is contiguous: src_blocks must be empty"
        )
    with as_param_invalid():
        return plan_scatter(
            cache.layout.bases[mine],
            entry.bases[theirs],
            dst_blocks,
            cache.layout.stride,
            cache.layout.block_bytes,
            found.slot * entry.stride,
            entry.block_bytes,
        )

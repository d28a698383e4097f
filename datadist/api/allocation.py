"""The cache manager's part that makes and frees caches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from datadist.api.arguments import (
    blocks_name,
    check_addresses,
    check_count,
    check_key_count,
    check_kind,
    check_not_none,
    check_pieces,
    check_unique,
    layout_of,
    name_of,
    slot_names,
    tensor_size,
    without_placeholders,
)
from datadist.api.cache import Cache, is_of_other_engine
from datadist.api.manager_mixin import ManagerMixin
from datadist.api.tensors import check_memory, take
from datadist.base import checks
from datadist.base.callers import pass_on
from datadist.base.calls import begin, entries, inside_call
from datadist.base.keywords import NoKeywords, keywords_of, named_keywords, unknown_keyword
from datadist.caches.by_address import cuts
from datadist.caches.directory import KeyName
from datadist.caches.owned import OwnCache
from datadist.engine.engine import Engine
from datadist.status import LLMException, LLMStatusCode, param_invalid
from datadist.types import BlocksCacheKey, CacheDesc, CacheKey, Placement, fixed

if TYPE_CHECKING:
    from typing_extensions import Unpack

UNREGISTER_SECONDS = 2.0
"""How long `unregister_cache` waits for peers to confirm that they do not access the memory."""

Names = Callable[[], list[tuple[int, KeyName]]]
"""Returns slot and name of each key of a new cache; called after all earlier checks."""


@named_keywords
@entries
class Allocation(ManagerMixin):
    """Caches from the pools and over memory of the caller."""

    # -- allocate ----------------------------------------------------------------------------

    def allocate_cache(
        self,
        cache_desc: CacheDesc,
        cache_keys: Sequence[CacheKey] = (),
        **unknown: Unpack[NoKeywords],
    ) -> Cache:
        """A contiguous cache from the pool of its placement; ``cache_keys[i]`` names slot ``i``.

        The tensors hold what was in the pool before; a fresh pool is zeroed.

        Raises LLMException: LLM_PARAM_INVALID without a pool, for bad dimensions, for more keys
        than slots or keys that are bound already; LLM_OUT_OF_MEMORY.
        """
        begin("allocate_cache")
        if unknown:
            raise unknown_keyword("allocate_cache", keywords_of(Allocation.allocate_cache), unknown)
        checks.check_isinstance("cache_desc", cache_desc, CacheDesc)
        checks.check_sequence_of("cache_keys", cache_keys, CacheKey)
        return self._allocate(cache_desc, lambda: slot_names(cache_keys), blocks=False)

    def allocate_blocks_cache(
        self,
        cache_desc: CacheDesc,
        blocks_cache_key: BlocksCacheKey | None = None,
        **unknown: Unpack[NoKeywords],
    ) -> Cache:
        """A blocks cache (PagedAttention) from the pool; dimension 0 counts the blocks.

        Raises as :meth:`allocate_cache`.
        """
        begin("allocate_blocks_cache")
        if unknown:
            raise unknown_keyword(
                "allocate_blocks_cache", keywords_of(Allocation.allocate_blocks_cache), unknown
            )
        checks.check_isinstance("cache_desc", cache_desc, CacheDesc)
        checks.check_isinstance("blocks_cache_key", blocks_cache_key, BlocksCacheKey)
        return self._allocate(cache_desc, lambda: blocks_name(blocks_cache_key), blocks=True)

    def _allocate(self, given: CacheDesc, names: Names, blocks: bool) -> Cache:
        check_not_none("cache_desc", given)
        desc = fixed(given)
        if desc.num_tensors <= 0:
            raise param_invalid("num_tensors is 0: a cache has at least one tensor")
        engine = self._engine()
        placement = desc.placement
        if not engine.memory.has_pool(placement):
            option = "mem_pool_cfg" if placement is Placement.DEVICE else "host_mem_pool_cfg"
            raise param_invalid(
                f"no {placement.name} pool is configured: set {option} before init, for example "
                '{"memory_size": 1073741824}, or register memory of your own'
            )
        keys = names()
        size = tensor_size(desc)
        if blocks:
            engine.words.prepare()
        birth = engine.owned.begin(placement)
        try:
            addresses = engine.memory.allocate(placement, [size] * desc.num_tensors, birth.runs)
            region_id, region = engine.memory.pool_region(placement)
            cache = OwnCache(
                birth.cache_id, layout_of(desc, addresses, size, blocks), True, True, (region_id,),
                runs=birth.runs,
            )  # fmt: skip
            check_key_count(keys, desc)
            check_unique(engine, keys)
            engine.owned.add(cache, without_placeholders(keys), unique=True)
            handle = Cache(
                birth.cache_id, given, addresses, blocks,
                pooled=True, keeper=region.keeper,
                addressable=placement in engine.transport.capabilities.host_addressable,
                owner=self, made=desc,
                release=self._ending(self.deallocate_blocks_cache if blocks else self.deallocate_cache),
            )  # fmt: skip
            birth.made = True  # no handler of a signal comes between this and the return
            return handle
        except BaseException:
            birth.failed = True
            engine.owned.settle()
            raise

    def _ending(self, free: Callable[[Cache], None]) -> Callable[[Cache], None]:
        """Called at the end of ``with``; does nothing if `finalize` has already freed the cache."""

        def end(cache: Cache) -> None:
            try:
                free(cache)
            except LLMException as error:
                if error.status_code is not LLMStatusCode.LLM_ENGINE_FINALIZED:
                    raise

        return end

    def deallocate_cache(self, cache: Cache) -> None:
        """Give up a contiguous cache; its memory returns when its last key is gone.

        Freed, unknown and registered caches, and those of another engine, are left alone.
        ``tensor_addrs`` is empty afterwards.

        Raises LLMException: LLM_PARAM_INVALID for a blocks cache, LLM_FEATURE_NOT_ENABLED where no
        pool is configured.
        """
        self._deallocate(cache, blocks=False)

    def deallocate_blocks_cache(self, cache: Cache) -> None:
        """Give up a blocks cache together with its key. Raises as :meth:`deallocate_cache`."""
        self._deallocate(cache, blocks=True)

    def _deallocate(self, cache: Cache, blocks: bool) -> None:
        checks.check_isinstance("cache", cache, Cache)
        other = "deallocate_cache" if blocks else "deallocate_blocks_cache"
        check_kind("cache", cache, blocks, f"use {other}")
        engine = self._engine()
        self._require_pool(engine)
        if not is_of_other_engine(cache, self):
            engine.owned.deallocate(cache.cache_id)
        cache.tensor_addrs.clear()

    def remove_cache_key(self, cache_key: CacheKey) -> None:
        """Unbind a key from a cache of the pool; unknown and pulled keys are left alone.

        The prefix id counts if it is valid, else the request id; the cluster id does not.

        Raises LLMException (LLM_FEATURE_NOT_ENABLED) where no pool is configured.
        """
        check_not_none("cache_key", cache_key)
        checks.check_isinstance("cache_key", cache_key, CacheKey)
        engine = self._engine()
        self._require_pool(engine)
        engine.owned.remove_key(name_of(cache_key))

    @staticmethod
    def _require_pool(engine: Engine) -> None:
        if not engine.memory.has_pool():
            raise LLMException(
                "no memory pool is configured (mem_pool_cfg, host_mem_pool_cfg): there is nothing "
                "that could be freed; use unregister_cache for registered memory",
                status_code=LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
            )

    # -- register ----------------------------------------------------------------------------

    def register_cache(
        self,
        cache_desc: CacheDesc,
        addrs: list[Any],
        cache_keys: Sequence[CacheKey] = (),
        remote_accessible: bool | None = None,
        **unknown: Unpack[NoKeywords],
    ) -> Cache:
        """A contiguous cache over memory of the caller: one address per tensor, ``size`` bytes each.

        Instead of an address a tensor of NumPy, torch or another library may be given, which must
        agree with the description, and is kept until the cache is unregistered; where its slots lie
        apart, ``block_stride`` need not be given. With ``block_stride`` the slots lie so far apart,
        and the last one needs its own bytes only.
        Several caches may share memory, also in part.

        Peers reach it through links made afterwards. ``remote_accessible`` matters in one-sided
        mode; None means True for DEVICE and False for HOST, and False for both after `link`. Memory of
        a pool (:meth:`allocate_tensor`) is reached through all links; None means True for it.

        Raises LLMException: LLM_PARAM_INVALID for ``remote_accessible=True`` after `link`, a wrong
        number of addresses, address 0, or a range that overlaps in part what is unregistered, but
        exposed by a live link; LLM_FAILED where the transport refuses the memory.
        """
        begin("register_cache")
        if unknown:
            raise unknown_keyword("register_cache", keywords_of(Allocation.register_cache), unknown)
        _check_memory(cache_desc, addrs)
        checks.check_sequence_of("cache_keys", cache_keys, CacheKey)
        self._check_accessible(remote_accessible, cache_desc, addrs)
        return self._register(
            cache_desc, addrs, lambda: slot_names(cache_keys), remote_accessible, False
        )

    def register_blocks_cache(
        self,
        cache_desc: CacheDesc,
        addrs: list[Any],
        blocks_cache_key: BlocksCacheKey | None = None,
        remote_accessible: bool | None = None,
        **unknown: Unpack[NoKeywords],
    ) -> Cache:
        """A blocks cache over memory of the caller. Arguments, errors as :meth:`register_cache`."""
        begin("register_blocks_cache")
        if unknown:
            raise unknown_keyword(
                "register_blocks_cache", keywords_of(Allocation.register_blocks_cache), unknown
            )
        _check_memory(cache_desc, addrs)
        checks.check_isinstance("blocks_cache_key", blocks_cache_key, BlocksCacheKey)
        self._check_accessible(remote_accessible, cache_desc, addrs)
        return self._register(
            cache_desc, addrs, lambda: blocks_name(blocks_cache_key), remote_accessible, True
        )

    def unregister_cache(self, cache_id: int) -> None:
        """Forget a cache with its keys; the id of an allocated one is freed. Unknown ids pass.

        Raises LLMException (LLM_FAILED), and keeps the cache, while a peer may be writing into it.
        """
        checks.check_int64("cache_id", cache_id)
        engine = self._engine()
        engine.owned.unregister(
            cache_id,
            UNREGISTER_SECONDS,
            certain=self._one_sided,
            waits=not inside_call(sys._getframe(1)),
        )

    def _check_accessible(
        self, remote_accessible: bool | None, desc: CacheDesc, addrs: list[Any]
    ) -> None:
        checks.check_isinstance("remote_accessible", remote_accessible, bool)
        if remote_accessible and self._linked and not self._in_pool(desc, addrs):
            raise param_invalid(
                "remote_accessible=True after link: the links that exist do not reach this memory; "
                "register before link (finalize and init to start over)"
            )

    def _in_pool(self, desc: CacheDesc, addrs: list[Any]) -> bool:
        """Whether the memory of a cache is that of pools, which links reach that were made before.

        Not where something is wrong with it: that is said later, in the documented order of checks.
        """
        engine = self._engine()
        try:
            check_count(desc, addrs)
            made, addresses, _ = take(desc, addrs, self._host_addressable)
            return engine.memory.pool_holds(addresses, tensor_size(made))
        except (AttributeError, TypeError, LLMException) as error:
            pass_on(error)
            return False

    def _host_addressable(self) -> frozenset[Placement]:
        return self._engine().transport.capabilities.host_addressable

    def _register(
        self,
        given: CacheDesc,
        addrs: list[Any],
        names: Names,
        remote_accessible: bool | None,
        blocks: bool,
    ) -> Cache:
        check_count(given, addrs)
        desc, addresses, tensors = take(given, addrs, self._host_addressable)
        check_addresses(addresses)
        engine = self._engine()
        keys = names()
        size = tensor_size(desc)
        check_key_count(keys, desc)
        accessible = remote_accessible
        if accessible is None:
            pooled = engine.memory.pool_holds(addresses, size)
            accessible = pooled or (desc.placement is Placement.DEVICE and not self._linked)
        if blocks:
            engine.words.prepare()
        birth = engine.owned.begin(None)
        try:
            regions: list[int] = []
            if accessible or not self._one_sided:
                regions = engine.memory.register(addresses, size, desc.placement, birth.cache_id)
            layout = layout_of(desc, addresses, size, blocks)
            layout = replace(layout, cuts=cuts(layout, engine.memory.begins(regions)))
            check_pieces(layout, regions)
            cache = OwnCache(
                birth.cache_id, layout, False, accessible, tuple(regions), tensors=tensors
            )
            engine.owned.add(cache, without_placeholders(keys), unique=False)
            handle = Cache(
                birth.cache_id, given, addresses, blocks,
                memory=tensors,
                addressable=desc.placement in engine.transport.capabilities.host_addressable,
                owner=self, made=desc,
                release=self._ending(lambda handle: self.unregister_cache(handle.cache_id)),
            )  # fmt: skip
            birth.made = True
            return handle
        except BaseException:
            birth.failed = True
            engine.owned.settle()
            engine.memory.settle()
            raise


def _check_memory(desc: CacheDesc, addrs: list[Any]) -> None:
    checks.check_isinstance("cache_desc", desc, CacheDesc)
    if addrs is not None:  # None fails where the addresses are used
        check_memory(addrs)

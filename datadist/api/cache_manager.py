"""The documented `CacheManager`: allocate, register and pull caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from datadist import checks
from datadist.api.arguments import (
    blocks_name,
    check_addresses,
    check_cache,
    check_desc,
    check_key_count,
    check_not_none,
    check_one_id,
    check_source_blocks,
    check_unique,
    layers_of,
    layout_of,
    name_of,
    slot_names,
    source_of,
    tensor_size,
    tensors_per_layer,
    without_placeholders,
)
from datadist.api.cache import Cache
from datadist.engine.directory import KeyName
from datadist.engine.engine import Engine
from datadist.engine.owned import OwnCache
from datadist.status import LLMException, LLMStatusCode, param_invalid
from datadist.types import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    Placement,
)

__all__ = ["CacheManager"]

UNREGISTER_SECONDS = 2.0
"""How long `unregister_cache` waits for peers to confirm that they are out of the memory."""


class CacheManager:
    """Caches of one engine; from :attr:`LLMDataDist.cache_manager`. Methods may run in any thread.

    Checks and their order, exceptions and status codes follow the LLM-DataDist API reference
    (CacheManager). ``TypeError`` and ``ValueError`` are for arguments of a wrong type or out of the
    range of their type, :class:`LLMException` with LLM_PARAM_INVALID for wrong values.
    """

    def __init__(self, engine: Callable[[], Engine], one_sided: bool) -> None:
        self._engine = engine
        self._one_sided = one_sided
        self._linked = False

    def set_is_call_linked(self) -> None:
        """Note that `link` was called: registered memory is not remote accessible from now on."""
        self._linked = True

    # -- allocate ----------------------------------------------------------------------------

    def allocate_cache(self, cache_desc: CacheDesc, cache_keys: Sequence[CacheKey] = ()) -> Cache:
        """A contiguous cache from the pool of its placement; ``cache_keys[i]`` names slot ``i``.

        The tensors hold what was in the pool before; a fresh pool is zeroed.

        Raises LLMException: LLM_PARAM_INVALID without a pool, for bad dimensions, for more keys
        than slots or keys that are bound already; LLM_OUT_OF_MEMORY.
        """
        check_desc(cache_desc)
        checks.check_sequence_of("cache_keys", cache_keys, CacheKey)
        return self._allocate(cache_desc, slot_names(cache_keys), blocks=False)

    def allocate_blocks_cache(
        self, cache_desc: CacheDesc, blocks_cache_key: BlocksCacheKey | None = None
    ) -> Cache:
        """A blocks cache (PagedAttention) from the pool; dimension 0 counts the blocks.

        Raises as :meth:`allocate_cache`.
        """
        check_desc(cache_desc)
        checks.check_isinstance("blocks_cache_key", blocks_cache_key, BlocksCacheKey)
        return self._allocate(cache_desc, blocks_name(blocks_cache_key), blocks=True)

    def _allocate(self, desc: CacheDesc, keys: list[tuple[int, KeyName]], blocks: bool) -> Cache:
        engine = self._engine()
        if desc.num_tensors <= 0:
            raise param_invalid("num_tensors is 0: a cache has at least one tensor")
        placement = desc.placement
        if not engine.memory.has_pool(placement):
            option = "mem_pool_cfg" if placement is Placement.DEVICE else "host_mem_pool_cfg"
            raise param_invalid(
                f"no {placement.name} pool is configured: set {option} before init, for example "
                '{"memory_size": 1073741824}, or register memory of your own'
            )
        size = tensor_size(desc)
        cache_id = engine.owned.new_id()
        addresses = engine.memory.allocate(placement, [size] * desc.num_tensors)
        region_id, region = engine.memory.pool_region(placement)
        cache = OwnCache(
            cache_id, layout_of(desc, addresses, size, blocks), True, True, (region_id,)
        )
        try:
            check_key_count(keys, desc)
            check_unique(engine, keys)
            engine.owned.add(cache, without_placeholders(keys), unique=True)
        except BaseException:
            engine.memory.free(placement, addresses)
            raise
        release = self.deallocate_blocks_cache if blocks else self.deallocate_cache
        addressable = placement in engine.transport.capabilities.host_addressable
        return Cache(cache_id, desc, addresses, blocks, region.keeper, addressable, release)

    def deallocate_cache(self, cache: Cache) -> None:
        """Give up a contiguous cache; its memory returns when its last key is gone.

        Freed, unknown and registered caches are left alone. ``tensor_addrs`` is empty afterwards.

        Raises LLMException: LLM_PARAM_INVALID for a blocks cache, LLM_FEATURE_NOT_ENABLED where no
        pool is configured.
        """
        self._deallocate(cache, blocks=False)

    def deallocate_blocks_cache(self, cache: Cache) -> None:
        """Give up a blocks cache together with its key. Raises as :meth:`deallocate_cache`."""
        self._deallocate(cache, blocks=True)

    def _deallocate(self, cache: Cache, blocks: bool) -> None:
        check_cache("cache", cache)
        if cache.is_blocks_cache is not blocks:
            other = "deallocate_cache" if blocks else "deallocate_blocks_cache"
            raise param_invalid(f"{cache!r} is freed by {other}")
        engine = self._engine()
        self._require_pool(engine)
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
        addrs: list[int],
        cache_keys: Sequence[CacheKey] = (),
        remote_accessible: bool | None = None,
    ) -> Cache:
        """A contiguous cache over memory of the caller: one address per tensor, ``size`` bytes each.

        Peers reach it through links made afterwards. ``remote_accessible`` matters in one-sided
        mode; None means True for DEVICE and False for HOST, and False for both after `link`.

        Raises LLMException: LLM_PARAM_INVALID for ``remote_accessible=True`` after `link`, a wrong
        number of addresses, address 0, or a range that overlaps another in part; LLM_FAILED where
        the transport refuses the memory.
        """
        self._check_register(cache_desc, addrs, remote_accessible)
        checks.check_sequence_of("cache_keys", cache_keys, CacheKey)
        self._check_accessible(remote_accessible)
        return self._register(cache_desc, addrs, slot_names(cache_keys), remote_accessible, False)

    def register_blocks_cache(
        self,
        cache_desc: CacheDesc,
        addrs: list[int],
        blocks_cache_key: BlocksCacheKey | None = None,
        remote_accessible: bool | None = None,
    ) -> Cache:
        """A blocks cache over memory of the caller. Arguments, errors as :meth:`register_cache`."""
        self._check_register(cache_desc, addrs, remote_accessible)
        checks.check_isinstance("blocks_cache_key", blocks_cache_key, BlocksCacheKey)
        self._check_accessible(remote_accessible)
        return self._register(
            cache_desc, addrs, blocks_name(blocks_cache_key), remote_accessible, True
        )

    def unregister_cache(self, cache_id: int) -> None:
        """Forget a cache with its keys; the id of an allocated one is freed. Unknown ids pass.

        Raises LLMException (LLM_FAILED), and keeps the cache, while a peer may be writing into it.
        """
        checks.check_int64("cache_id", cache_id)
        self._engine().owned.unregister(cache_id, UNREGISTER_SECONDS, certain=self._one_sided)

    @staticmethod
    def _check_register(desc: CacheDesc, addrs: list[int], remote_accessible: bool | None) -> None:
        check_desc(desc)
        checks.check_list_of_int("addrs", addrs)
        checks.check_isinstance("remote_accessible", remote_accessible, bool)

    def _check_accessible(self, remote_accessible: bool | None) -> None:
        if remote_accessible and self._linked:
            raise param_invalid(
                "remote_accessible=True after link: the links that exist do not reach this memory; "
                "register before link (finalize and init to start over)"
            )

    def _register(
        self,
        desc: CacheDesc,
        addrs: list[int],
        keys: list[tuple[int, KeyName]],
        remote_accessible: bool | None,
        blocks: bool,
    ) -> Cache:
        check_addresses(desc, addrs)
        engine = self._engine()
        size = tensor_size(desc)
        check_key_count(keys, desc)
        accessible = remote_accessible
        if accessible is None:
            accessible = desc.placement is Placement.DEVICE and not self._linked
        cache_id = engine.owned.new_id()
        regions: list[int] = []
        if accessible or not self._one_sided:
            regions = engine.memory.register(addrs, size, desc.placement)
        cache = OwnCache(
            cache_id, layout_of(desc, addrs, size, blocks), False, accessible, tuple(regions)
        )
        engine.owned.add(cache, without_placeholders(keys), unique=False)
        addressable = desc.placement in engine.transport.capabilities.host_addressable
        return Cache(
            cache_id,
            desc,
            list(addrs),
            blocks,
            None,
            addressable,
            lambda handle: self.unregister_cache(handle.cache_id),
        )

    # -- pull --------------------------------------------------------------------------------

    def pull_cache(
        self,
        cache_key: CacheKey | CacheKeyByIdAndIndex,
        cache: Cache,
        batch_index: int = 0,
        size: int = -1,
        **kwargs: Any,
    ) -> None:
        """Pull the slot that a key names on its cluster into slot ``batch_index`` of ``cache``.

        ``size`` is bytes from the start of the slot in each tensor; -1 means all of the local slot.
        Keywords: ``src_layer_range``, ``dst_layer_range`` (``range``, step 1; None or empty means
        all) and ``tensor_num_per_layer`` (default 2).

        In two-sided mode a request key, also one found by id and slot, is consumed once all tensors
        were pulled. In one-sided mode only :class:`CacheKeyByIdAndIndex` is accepted.

        Raises LLMException: LLM_PARAM_INVALID, LLM_KV_CACHE_NOT_EXIST (unknown cache or key),
        LLM_NOT_YET_LINK (no usable link), LLM_TIMEOUT (``sync_kv_timeout``), LLM_FAILED.
        """
        kinds = (CacheKeyByIdAndIndex,) if self._one_sided else (CacheKey, CacheKeyByIdAndIndex)
        checks.check_isinstance("cache_key", cache_key, kinds)
        check_cache("cache", cache)
        checks.check_uint32("batch_index", batch_index)
        checks.check_int64("size", size)
        if cache.is_blocks_cache:
            raise param_invalid(f"{cache!r} is a blocks cache: use pull_blocks")
        if size != -1 and size <= 0:
            raise param_invalid(f"size is {size}: it must be -1 (the whole slot) or positive")
        per_layer = tensors_per_layer(kwargs)
        check_not_none("cache_key", cache_key)
        if isinstance(cache_key, CacheKey):
            check_one_id(cache_key)
        layers = layers_of(kwargs, per_layer)
        self._engine().transfers.pull_cache(
            cache_key.cluster_id, source_of(cache_key), cache.cache_id, batch_index, size, layers
        )

    def pull_blocks(
        self,
        src_cache_key: CacheKey | CacheKeyByIdAndIndex | BlocksCacheKey,
        dst_cache: Cache,
        src_blocks: Sequence[int] = (),
        dst_blocks: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        """Pull into blocks of ``dst_cache``.

        With a :class:`BlocksCacheKey` ``src_blocks[i]`` of the owner goes to ``dst_blocks[i]``.
        With the other keys ``src_blocks`` is empty and the contiguous slot is spread over
        ``dst_blocks`` in order. Keywords and errors as :meth:`pull_cache`.
        """
        kinds = (CacheKey, CacheKeyByIdAndIndex, BlocksCacheKey)
        checks.check_isinstance("src_cache_key", src_cache_key, kinds)
        check_cache("dst_cache", dst_cache)
        checks.check_sequence_of("src_blocks", src_blocks, int)
        checks.check_sequence_of("dst_blocks", dst_blocks, int)
        if not dst_cache.is_blocks_cache:
            raise param_invalid(f"{dst_cache!r} is not a blocks cache: use pull_cache")
        if not dst_blocks:
            raise param_invalid("dst_blocks is empty: list the blocks to pull into")
        per_layer = tensors_per_layer(kwargs)
        check_not_none("src_cache_key", src_cache_key)
        check_source_blocks(src_cache_key, src_blocks)
        layers = layers_of(kwargs, per_layer)
        cluster = src_cache_key.cluster_id
        self._engine().transfers.pull_blocks(
            cluster, source_of(src_cache_key), dst_cache.cache_id, src_blocks, dst_blocks, layers
        )

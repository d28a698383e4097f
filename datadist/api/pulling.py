"""The cache manager's part that pulls from other clusters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datadist.api.arguments import (
    PER_LAYER,
    check_kind,
    check_not_none,
    check_one_id,
    check_per_layer,
    check_source_blocks,
    cluster_of,
    layers_of,
    source_of,
)
from datadist.api.cache import Cache, own_cache_id
from datadist.api.manager_mixin import ManagerMixin
from datadist.base import checks
from datadist.base.calls import begin, entries
from datadist.base.keywords import NoKeywords, keywords_of, named_keywords, unknown_keyword
from datadist.status import param_invalid
from datadist.transfers.plan import Blocks
from datadist.types import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex

if TYPE_CHECKING:
    from typing_extensions import Unpack

TWO = 2


@named_keywords
@entries
class Pulling(ManagerMixin):
    """Pulls, in both modes."""

    def pull_cache(
        self,
        cache_key: CacheKey | CacheKeyByIdAndIndex,
        cache: Cache,
        batch_index: int = 0,
        size: int = -1,
        *,
        src_layer_range: range | None = None,
        dst_layer_range: range | None = None,
        tensor_num_per_layer: int = PER_LAYER,
        **unknown: Unpack[NoKeywords],
    ) -> None:
        """Pull the slot that a key names on its cluster into slot ``batch_index`` of ``cache``.

        ``size`` is bytes from the start of the slot in each tensor; -1 means all of the local slot.
        Layer ranges have step 1; None or an empty one means all layers. A layer has
        ``tensor_num_per_layer`` tensors: unless that is given, as many as both caches say, which must
        agree.

        In two-sided mode a request key, also one found by id and slot, is consumed once all tensors
        were pulled. In one-sided mode only :class:`CacheKeyByIdAndIndex` is accepted.

        Bytes are not converted: element types that differ are a warning, once for each peer, and
        with ``datadist.check_types`` LLM_PARAM_INVALID before anything is moved or consumed.

        Raises LLMException: LLM_PARAM_INVALID, LLM_KV_CACHE_NOT_EXIST (unknown cache or key),
        LLM_NOT_YET_LINK (no usable link), LLM_TIMEOUT (``sync_kv_timeout``), LLM_FAILED.
        """
        begin("pull_cache")
        if unknown:
            raise unknown_keyword("pull_cache", keywords_of(Pulling.pull_cache), unknown)
        if self._one_sided and isinstance(cache_key, CacheKey):
            raise TypeError(
                f"cache_key is a CacheKey ({cache_key!r}): with enable_remote_cache_accessible "
                "pull_cache takes CacheKeyByIdAndIndex only"
            )
        checks.check_isinstance("cache_key", cache_key, (CacheKey, CacheKeyByIdAndIndex))
        checks.check_isinstance("cache", cache, Cache)
        checks.check_uint32("batch_index", batch_index)
        checks.check_int64("size", size)
        check_kind("cache", cache, False, "use pull_blocks")
        if size != -1 and size <= 0:
            raise param_invalid(f"size is {size}: it must be -1 (the whole slot) or positive")
        check_per_layer(tensor_num_per_layer)
        check_not_none("cache_key", cache_key)
        if isinstance(cache_key, CacheKey):
            check_one_id(cache_key)
        layers = layers_of(cache, src_layer_range, dst_layer_range, tensor_num_per_layer)
        cluster, source = cluster_of(cache_key), source_of(cache_key)
        self._engine().pulls.pull_cache(
            cluster, source, own_cache_id(cache, self), batch_index, size, layers
        )

    def pull_blocks(
        self,
        src_cache_key: CacheKey | CacheKeyByIdAndIndex | BlocksCacheKey,
        dst_cache: Cache,
        src_blocks: Blocks = (),
        dst_blocks: Blocks = (),
        *,
        src_layer_range: range | None = None,
        dst_layer_range: range | None = None,
        tensor_num_per_layer: int = PER_LAYER,
        **unknown: Unpack[NoKeywords],
    ) -> None:
        """Pull into blocks of ``dst_cache``.

        With a :class:`BlocksCacheKey` ``src_blocks[i]`` of the owner goes to ``dst_blocks[i]``.
        With the other keys ``src_blocks`` is empty and the contiguous slot is spread over
        ``dst_blocks`` in order. No destination is listed twice. Lists of blocks may be NumPy arrays
        of integers, which saves time for long ones, or hold NumPy's integers. Layers and errors as
        :meth:`pull_cache`.
        """
        engine = self._bound
        if (
            type(src_cache_key) is BlocksCacheKey
            and type(dst_cache) is Cache
            and src_layer_range is None
            and dst_layer_range is None
            and (tensor_num_per_layer is PER_LAYER or tensor_num_per_layer is TWO)
            and not unknown
        ):
            # Fields instead of properties and calls, since every small pull runs this code.
            name = src_cache_key._cluster_id, src_cache_key._model_id, dst_cache._cache_id
            if (
                engine is not None
                and dst_cache._owner is self
                and engine.route_cache.pull(name, src_blocks, dst_blocks)
            ):
                return
        begin("pull_blocks")
        if unknown:
            raise unknown_keyword("pull_blocks", keywords_of(Pulling.pull_blocks), unknown)
        kinds = (CacheKey, CacheKeyByIdAndIndex, BlocksCacheKey)
        checks.check_isinstance("src_cache_key", src_cache_key, kinds)
        checks.check_isinstance("dst_cache", dst_cache, Cache)
        checks.check_blocks("src_blocks", src_blocks)
        checks.check_blocks("dst_blocks", dst_blocks)
        check_kind("dst_cache", dst_cache, True, "use pull_cache")
        if not len(dst_blocks):
            raise param_invalid("dst_blocks is empty: list the blocks to pull into")
        check_per_layer(tensor_num_per_layer)
        check_not_none("src_cache_key", src_cache_key)
        check_source_blocks(src_cache_key, src_blocks)
        layers = layers_of(dst_cache, src_layer_range, dst_layer_range, tensor_num_per_layer)
        cluster, source = cluster_of(src_cache_key), source_of(src_cache_key)
        self._engine().pulls.pull_blocks(
            cluster, source, own_cache_id(dst_cache, self), src_blocks, dst_blocks, layers
        )

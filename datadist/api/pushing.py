"""The cache manager's part that pushes into other clusters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datadist.api.arguments import (
    PER_LAYER,
    check_kind,
    check_not_none,
    check_per_layer,
    cluster_of,
    name_of,
    per_layer_of,
)
from datadist.api.cache import Cache, desc_at_creation, own_cache_id
from datadist.api.call_options import PreparedTransfer, notice_of, seconds_of
from datadist.api.manager_mixin import ManagerMixin
from datadist.api.tasks import check_layer_range
from datadist.base import checks
from datadist.base.calls import begin, entries
from datadist.base.keywords import NoKeywords, keywords_of, named_keywords, unknown_keyword
from datadist.base.lazy_module import LazyModule
from datadist.status import param_invalid
from datadist.transfers.block_lists import Blocks, check_distinct
from datadist.transfers.limits import CallLimit
from datadist.transfers.push import PushLayers, layers_to_push
from datadist.transfers.resolve import ById
from datadist.transfers.transfer import as_param_invalid
from datadist.types import BlocksCacheKey, CacheKeyByIdAndIndex

if TYPE_CHECKING:
    import typing_extensions as extensions
    from typing_extensions import Unpack
else:
    extensions = LazyModule("typing_extensions")


@named_keywords
@entries
class Pushing(ManagerMixin):
    """Pushes, in one-sided mode only."""

    def push_cache(
        self,
        dst_cache_key: CacheKeyByIdAndIndex,
        src_cache: Cache,
        src_batch_index: int = 0,
        src_layer_range: range | None = None,
        dst_layer_range: range | None = None,
        size: int = -1,
        tensor_num_per_layer: int = PER_LAYER,
        *,
        timeout_in_millis: int | None = None,
        notify: extensions.Buffer | None = None,
        **unknown: Unpack[NoKeywords],
    ) -> None:
        """Push slot ``src_batch_index`` of ``src_cache`` into the slot that the key names.

        Layer ``src_layer_range[i]`` goes to ``dst_layer_range[i]`` (step 1, equal lengths; None
        means all layers of the source; ``tensor_num_per_layer`` as in pulls). ``size`` must be -1: the
        whole local slot, which must not be larger than the remote one. Consumes no key. Element types
        as in :meth:`pull_cache`.

        ``timeout_in_millis`` (1 to 2^31-1) limits the whole call, in place of ``sync_kv_timeout`` for
        each layer. ``notify`` (at most 8 KiB) is sent to the target as a message once the data is in
        place, see :meth:`LLMDataDist.send_message`.

        Raises LLMException: LLM_PARAM_INVALID (also in two-sided mode), LLM_KV_CACHE_NOT_EXIST
        (unknown local or remote cache), LLM_NOT_YET_LINK, LLM_TIMEOUT (the time limit; where the text
        says that the data is in place, of the message alone), LLM_FAILED.
        """
        begin("push_cache")
        if unknown:
            raise unknown_keyword("push_cache", keywords_of(Pushing.push_cache), unknown)
        limit, notice = CallLimit(seconds_of(timeout_in_millis)), notice_of(notify)
        prepared = self._prepare_push_cache(
            dst_cache_key, src_cache, src_batch_index, src_layer_range, dst_layer_range, size,
            tensor_num_per_layer,
        )  # fmt: skip
        self._move(prepared, limit, notice)

    def _prepare_push_cache(
        self, dst_cache_key: CacheKeyByIdAndIndex, src_cache: Cache, src_batch_index: int,
        src_layer_range: range | None, dst_layer_range: range | None, size: int,
        tensor_num_per_layer: int,
    ) -> PreparedTransfer:  # fmt: skip
        self._require_one_sided("push_cache")
        checks.check_isinstance(
            "dst_cache_key", dst_cache_key, CacheKeyByIdAndIndex, allow_none=False
        )
        checks.check_isinstance("src_cache", src_cache, Cache, allow_none=False)
        checks.check_uint32("src_batch_index", src_batch_index)
        check_kind("src_cache", src_cache, False, "use push_blocks")
        layers = _layers(src_cache, src_layer_range, dst_layer_range, tensor_num_per_layer)
        checks.check_int64("size", size)
        if size != -1:
            raise param_invalid(f"size is {size}, only support -1: the whole slot")
        target = ById(dst_cache_key.cache_id, dst_cache_key.batch_index)
        cluster, slot = dst_cache_key.cluster_id, src_batch_index
        pushes, cache_id = self._engine().pushes, own_cache_id(src_cache, self)
        return PreparedTransfer(
            cluster,
            lambda: pushes.check_cache(cluster, cache_id, slot, layers),
            lambda limit: pushes.push_cache(cluster, target, cache_id, slot, layers, limit),
        )

    def push_blocks(
        self,
        dst_cache_key: BlocksCacheKey,
        src_cache: Cache,
        src_blocks: Blocks = (),
        dst_blocks: Blocks = (),
        src_layer_range: range | None = None,
        dst_layer_range: range | None = None,
        tensor_num_per_layer: int = PER_LAYER,
        *,
        timeout_in_millis: int | None = None,
        notify: extensions.Buffer | None = None,
        **unknown: Unpack[NoKeywords],
    ) -> None:
        """Push ``src_blocks[i]`` of ``src_cache`` into ``dst_blocks[i]`` of the key's blocks cache.

        Lists of blocks may be NumPy arrays of integers; no destination is listed twice. Layer ranges,
        ``timeout_in_millis``, ``notify`` and errors as :meth:`push_cache`; blocks must be equally large
        at both ends.
        """
        if unknown:
            raise unknown_keyword("push_blocks", keywords_of(Pushing.push_blocks), unknown)
        if not self._one_sided:
            self._require_one_sided("push_blocks")
        engine = self._bound
        limit = notice = None
        if timeout_in_millis is not None or notify is not None:
            limit, notice = CallLimit(seconds_of(timeout_in_millis)), notice_of(notify)
        if (
            type(dst_cache_key) is BlocksCacheKey
            and type(src_cache) is Cache
            and src_layer_range is None
            and dst_layer_range is None
            and (tensor_num_per_layer is PER_LAYER or type(tensor_num_per_layer) is int)
        ):
            # Fields instead of properties and calls, since every small push runs this code.
            name = (
                dst_cache_key._cluster_id, dst_cache_key._model_id, src_cache._cache_id,
                src_cache._made._tensors_per_layer
                if tensor_num_per_layer is PER_LAYER
                else tensor_num_per_layer,
            )  # fmt: skip
            if (
                engine is not None
                and src_cache._owner is self
                and engine.route_cache.push(name, src_blocks, dst_blocks, limit)
            ):
                if limit is not None and notice is not None:
                    engine.notices.notify(notice, limit)
                return
        begin("push_blocks")
        limit = CallLimit() if limit is None else limit
        prepared = self._prepare_push_blocks(
            dst_cache_key, src_cache, src_blocks, dst_blocks, src_layer_range, dst_layer_range,
            tensor_num_per_layer,
        )  # fmt: skip
        self._move(prepared, limit, notice)

    def _prepare_push_blocks(
        self, dst_cache_key: BlocksCacheKey, src_cache: Cache, src_blocks: Blocks, dst_blocks: Blocks,
        src_layer_range: range | None, dst_layer_range: range | None, tensor_num_per_layer: int,
    ) -> PreparedTransfer:  # fmt: skip
        checks.check_isinstance("dst_cache_key", dst_cache_key, BlocksCacheKey)
        checks.check_isinstance("src_cache", src_cache, Cache)
        checks.check_blocks("src_blocks", src_blocks)
        checks.check_blocks("dst_blocks", dst_blocks)
        check_kind("src_cache", src_cache, True, "use push_cache")
        if not len(dst_blocks):
            raise param_invalid("dst_blocks is empty: list the blocks to push into")
        layers = _layers(src_cache, src_layer_range, dst_layer_range, tensor_num_per_layer)
        check_not_none("dst_cache_key", dst_cache_key)
        if len(src_blocks) != len(dst_blocks):
            raise param_invalid(
                f"src_blocks has {len(src_blocks)} entries and dst_blocks {len(dst_blocks)}: each "
                "source block goes to the destination block at the same place"
            )
        with as_param_invalid():
            check_distinct("dst_blocks", dst_blocks)
        pushes = self._engine().pushes
        cluster, target = cluster_of(dst_cache_key), name_of(dst_cache_key)
        cache_id = own_cache_id(src_cache, self)
        return PreparedTransfer(
            cluster,
            lambda: pushes.check_blocks(cluster, cache_id, src_blocks, layers),
            lambda limit: pushes.push_blocks(
                cluster, target, cache_id, src_blocks, dst_blocks, layers, limit
            ),
        )

    def _require_one_sided(self, method: str) -> None:
        if not self._one_sided:
            self._engine()
            raise param_invalid(
                f"{method} needs EnableRemoteCacheAccessible: set enable_remote_cache_accessible = "
                "True at both ends before init"
            )


def _layers(cache: Cache, source: range | None, target: range | None, per_layer: int) -> PushLayers:
    check_per_layer(per_layer)
    for name, layers in (("src_layer_range", source), ("dst_layer_range", target)):
        if layers is not None:
            check_layer_range(name, layers)
    number, named = per_layer_of(cache, per_layer)
    return layers_to_push(source, target, desc_at_creation(cache).num_tensors, number, named)

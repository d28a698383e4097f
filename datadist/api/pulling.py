"""The cache manager's part that pulls from other clusters."""

from __future__ import annotations

from collections.abc import Callable
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
    name_of,
    source_of,
)
from datadist.api.cache import Cache, own_cache_id
from datadist.api.call_options import PreparedTransfer, notice_of, seconds_of
from datadist.api.granting import Granting, token_of
from datadist.base import checks
from datadist.base.calls import begin, entries
from datadist.base.keywords import NoKeywords, keywords_of, named_keywords, unknown_keyword
from datadist.base.lazy_module import LazyModule
from datadist.status import param_invalid
from datadist.transfers.block_lists import Blocks
from datadist.transfers.granted_pull import GrantedRead
from datadist.transfers.limits import CallLimit
from datadist.types import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex

if TYPE_CHECKING:
    import typing_extensions as extensions
    from typing_extensions import Unpack
else:
    extensions = LazyModule("typing_extensions")

TWO = 2


@named_keywords
@entries
class Pulling(Granting):
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
        timeout_in_millis: int | None = None,
        notify: extensions.Buffer | None = None,
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

        ``timeout_in_millis`` (1 to 2^31-1) is the time limit of this call in place of
        ``sync_kv_timeout``. ``notify`` (at most 8 KiB) is sent to the owner as a message once the data
        is here, see :meth:`LLMDataDist.send_message`.

        Raises LLMException: LLM_PARAM_INVALID, LLM_KV_CACHE_NOT_EXIST (unknown cache or key),
        LLM_NOT_YET_LINK (no usable link), LLM_TIMEOUT (the time limit; where the text says that the
        data is in place, of the message alone), LLM_FAILED.
        """
        begin("pull_cache")
        if unknown:
            raise unknown_keyword("pull_cache", keywords_of(Pulling.pull_cache), unknown)
        limit, notice = CallLimit(seconds_of(timeout_in_millis)), notice_of(notify)
        prepared = self._prepare_pull_cache(
            cache_key, cache, batch_index, size, src_layer_range, dst_layer_range,
            tensor_num_per_layer,
        )  # fmt: skip
        self._move(prepared, limit, notice)

    def _prepare_pull_cache(
        self, cache_key: CacheKey | CacheKeyByIdAndIndex, cache: Cache, batch_index: int, size: int,
        src_layer_range: range | None, dst_layer_range: range | None, tensor_num_per_layer: int,
    ) -> PreparedTransfer:  # fmt: skip
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
        pulls, cache_id = self._engine().pulls, own_cache_id(cache, self)
        return PreparedTransfer(
            cluster,
            lambda: pulls.check_cache(cluster, cache_id, batch_index, size, layers),
            lambda limit: pulls.pull_cache(
                cluster, source, cache_id, batch_index, size, layers, limit
            ),
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
        token: bytes | None = None,
        release: bool = False,
        timeout_in_millis: int | None = None,
        notify: extensions.Buffer | None = None,
        **unknown: Unpack[NoKeywords],
    ) -> None:
        """Pull into blocks of ``dst_cache``.

        With a :class:`BlocksCacheKey` ``src_blocks[i]`` of the owner goes to ``dst_blocks[i]``.
        With the other keys ``src_blocks`` is empty and the contiguous slot is spread over
        ``dst_blocks`` in order. No destination is listed twice. Lists of blocks may be NumPy arrays
        of integers, which saves time for long ones, or hold NumPy's integers. Layers,
        ``timeout_in_millis``, ``notify`` and errors as :meth:`pull_cache`.

        A :class:`CacheKey` may also name a grant (`grant_blocks`). Then ``src_blocks`` are positions in
        the granted list, and none means all of them, in order. ``token`` is that of the grant, which
        saves a question to its owner. The pull that reads all blocks and layers, and any pull with
        ``release=True``, finishes with the grant. LLM_KV_CACHE_NOT_EXIST says that the grant has ended;
        what was read then must not be used. The time limit is that of the read and of all questions to
        the owner together; a message of ``notify`` arrives after the owner knows that this reader has
        finished.
        """
        engine = self._bound
        limit = notice = None
        if (timeout_in_millis is not None or notify is not None) and not unknown:
            limit, notice = CallLimit(seconds_of(timeout_in_millis)), notice_of(notify)
        if (
            type(src_cache_key) is BlocksCacheKey
            and type(dst_cache) is Cache
            and src_layer_range is None
            and dst_layer_range is None
            and (tensor_num_per_layer is PER_LAYER or tensor_num_per_layer is TWO)
            and token is None
            and release is False
            and not unknown
        ):
            # Fields instead of properties and calls, since every small pull runs this code.
            name = src_cache_key._cluster_id, src_cache_key._model_id, dst_cache._cache_id
            if (
                engine is not None
                and dst_cache._owner is self
                and engine.route_cache.pull(name, src_blocks, dst_blocks, limit)
            ):
                if limit is not None and notice is not None:
                    engine.notices.notify(notice, limit)
                return
        begin("pull_blocks")
        if unknown:
            raise unknown_keyword("pull_blocks", keywords_of(Pulling.pull_blocks), unknown)
        limit = CallLimit() if limit is None else limit
        prepared = self._prepare_pull_blocks(
            src_cache_key, dst_cache, src_blocks, dst_blocks, src_layer_range, dst_layer_range,
            tensor_num_per_layer, token, release, notice is not None,
        )  # fmt: skip
        self._move(prepared, limit, notice)

    def _prepare_pull_blocks(
        self, src_cache_key: CacheKey | CacheKeyByIdAndIndex | BlocksCacheKey, dst_cache: Cache,
        src_blocks: Blocks, dst_blocks: Blocks, src_layer_range: range | None,
        dst_layer_range: range | None, tensor_num_per_layer: int, token: bytes | None, release: bool,
        notifies: bool,
    ) -> PreparedTransfer:  # fmt: skip
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
        granted = self._may_be_granted(src_cache_key, token, release)
        if not granted:
            check_source_blocks(src_cache_key, src_blocks)
        layers = layers_of(dst_cache, src_layer_range, dst_layer_range, tensor_num_per_layer)
        cluster, source = cluster_of(src_cache_key), source_of(src_cache_key)
        pulls, cache_id = self._engine().pulls, own_cache_id(dst_cache, self)
        prepared = PreparedTransfer(
            cluster,
            lambda: pulls.check_blocks(cluster, cache_id, src_blocks, dst_blocks, layers),
            lambda limit: pulls.pull_blocks(
                cluster, source, cache_id, src_blocks, dst_blocks, layers, limit
            ),
        )
        if not granted or not isinstance(src_cache_key, CacheKey):
            return prepared
        read = GrantedRead(
            cluster, name_of(src_cache_key), cache_id, src_blocks, dst_blocks, layers,
            token_of(src_cache_key, token), release, notifies,
        )  # fmt: skip
        return self._prepare_granted(src_cache_key, read, prepared.move)

    def _prepare_granted(
        self, key: CacheKey, read: GrantedRead, otherwise: Callable[[CallLimit], None]
    ) -> PreparedTransfer:
        pulls = self._engine().granted_pulls

        def move(limit: CallLimit) -> None:
            if not pulls.pull(read, limit):
                check_source_blocks(key, read.positions)
                otherwise(limit)

        return PreparedTransfer(read.cluster, lambda: pulls.check(read), move)

"""The cache manager's part that pulls and pushes in the background."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from datadist.api.arguments import PER_LAYER
from datadist.api.cache import Cache
from datadist.api.call_options import PreparedTransfer, notice_of, seconds_of
from datadist.api.pulling import Pulling
from datadist.api.pushing import Pushing
from datadist.api.transfer_task import TransferTask
from datadist.base.calls import begin, entries
from datadist.base.keywords import named_keywords
from datadist.base.lazy_module import LazyModule
from datadist.status import system_errors
from datadist.transfers.background import BackgroundTransfer
from datadist.transfers.block_lists import Blocks
from datadist.transfers.limits import CallLimit
from datadist.types import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex

if TYPE_CHECKING:
    import typing_extensions as extensions
else:
    extensions = LazyModule("typing_extensions")


@named_keywords
@entries
class InBackground(Pulling, Pushing):
    """Pulls and pushes that return a task at once."""

    def pull_cache_async(
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
    ) -> TransferTask:
        """:meth:`pull_cache` in the background: returns at once.

        Transfers of one engine run on ``datadist.background_threads`` threads, those with one peer on
        half of them, and begin in the order of the calls for each peer. The time limit counts from the
        moment when it begins.

        Raises at once what :meth:`pull_cache` raises for arguments, for a cache of this engine that does
        not fit them, and LLM_FAILED where no thread can be started; the rest is the task's.
        """
        begin("pull_cache_async")
        prepared = self._prepare_pull_cache(
            cache_key, cache, batch_index, size, src_layer_range, dst_layer_range,
            tensor_num_per_layer,
        )  # fmt: skip
        return self._begin(prepared, timeout_in_millis, notify)

    def pull_blocks_async(
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
    ) -> TransferTask:
        """:meth:`pull_blocks` in the background; the lists are copied. As :meth:`pull_cache_async`.

        One of a grant that is cancelled, or fails, does not finish with the grant.
        """
        begin("pull_blocks_async")
        source, target = _copied(src_blocks), _copied(dst_blocks)
        prepared = self._prepare_pull_blocks(
            src_cache_key, dst_cache, source, target, src_layer_range, dst_layer_range,
            tensor_num_per_layer, token, release, notify is not None,
        )  # fmt: skip
        whole = (
            src_layer_range is None
            and dst_layer_range is None
            and tensor_num_per_layer == PER_LAYER
        )
        if isinstance(src_cache_key, BlocksCacheKey) and whole:
            routes, full = self._engine().route_cache, prepared.move
            name = prepared.cluster, src_cache_key.model_id, dst_cache.cache_id

            def move(limit: CallLimit) -> None:
                if not routes.pull(name, source, target, limit):
                    full(limit)

            prepared = replace(prepared, move=move)
        return self._begin(prepared, timeout_in_millis, notify)

    def push_cache_async(
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
    ) -> TransferTask:
        """:meth:`push_cache` in the background. As :meth:`pull_cache_async`."""
        begin("push_cache_async")
        prepared = self._prepare_push_cache(
            dst_cache_key, src_cache, src_batch_index, src_layer_range, dst_layer_range, size,
            tensor_num_per_layer,
        )  # fmt: skip
        return self._begin(prepared, timeout_in_millis, notify)

    def push_blocks_async(
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
    ) -> TransferTask:
        """:meth:`push_blocks` in the background; the lists are copied. As :meth:`pull_cache_async`."""
        begin("push_blocks_async")
        self._require_one_sided("push_blocks_async")
        prepared = self._prepare_push_blocks(
            dst_cache_key, src_cache, _copied(src_blocks), _copied(dst_blocks), src_layer_range,
            dst_layer_range, tensor_num_per_layer,
        )  # fmt: skip
        return self._begin(prepared, timeout_in_millis, notify)

    def _begin(
        self,
        prepared: PreparedTransfer,
        timeout_in_millis: int | None,
        notify: extensions.Buffer | None,
    ) -> TransferTask:
        limit, notice = CallLimit(seconds_of(timeout_in_millis)), notice_of(notify)
        prepared.check()
        engine = self._engine()

        def move(limit: CallLimit) -> None:
            self._engine()
            self._move(prepared, limit, notice)

        transfer = BackgroundTransfer(prepared.cluster, limit, move)
        try:
            with system_errors("the transfer cannot begin"):
                engine.background.submit(transfer)
            return TransferTask(transfer)
        except BaseException:
            transfer.cancel()  # nobody gets its task
            raise


def _copied(blocks: Blocks) -> Blocks:
    """The caller may change its list; what is none is refused as the synchronous call does."""
    if isinstance(blocks, np.ndarray):
        return blocks.copy()
    return list(blocks) if isinstance(blocks, list) else blocks

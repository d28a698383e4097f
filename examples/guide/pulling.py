"""All forms of pulling, and time limits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from two_engines import link, run

from datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LLMDataDist,
)

TENSORS, TOKENS, HEADS = 8, 32, 8
SLOTS = CacheDesc(TENSORS, [4, TOKENS, HEADS], DataType.DT_FLOAT16)
PAGED = CacheDesc(TENSORS, [96, TOKENS // 2, HEADS], DataType.DT_FLOAT16)  # two blocks are a slot


def keys_of_slots() -> list[CacheKey]:
    """Slots 0 and 1 are those of requests, slot 2 that of a prefix."""
    return [CacheKey(1, 7), CacheKey(1, 8), CacheKey(1, 2**64 - 1, prefix_id=7)]


def prompt(engine: LLMDataDist, meet: Callable[[], object]) -> None:
    """Own two caches: each slot and each block is full of its number."""
    manager = engine.cache_manager
    slots = manager.allocate_cache(SLOTS, keys_of_slots())
    paged = manager.allocate_blocks_cache(PAGED, BlocksCacheKey(1))
    for cache in (slots, paged):
        for tensor in cache.numpy():
            tensor[:] = np.arange(len(tensor))[:, None, None]
    link(engine, str(slots.cache_id).encode())
    meet()


def decoder(engine: LLMDataDist, meet: Callable[[], object]) -> None:
    """Pull."""
    manager = engine.cache_manager
    caches = manager.allocate_cache(SLOTS), manager.allocate_blocks_cache(PAGED)
    link(engine)
    pull(engine, int(engine.link_metadata(cluster_id=1)[1]))
    limit(engine)
    meet()
    for cache in caches:
        assert not cache.numpy()[0].any()


def pull(engine: LLMDataDist, cache_id: int) -> None:
    """Each form once."""
    manager = engine.cache_manager
    cache, paged = manager.allocate_cache(SLOTS), manager.allocate_blocks_cache(PAGED)
    req_id, slot = 7, 3
    where = np.arange(32, 96)
    # region pull
    manager.pull_cache(CacheKey(1, req_id), cache, batch_index=0)  # by request
    manager.pull_cache(CacheKey(1, 2**64 - 1, prefix_id=7), cache)  # by prefix: no request id
    manager.pull_cache(CacheKeyByIdAndIndex(1, cache_id, slot), cache)  # by the owner's cache id
    manager.pull_blocks(BlocksCacheKey(1), paged, [3, 4], [10, 11])  # block 3 to 10, 4 to 11
    manager.pull_blocks(BlocksCacheKey(1), paged, np.arange(64), where)  # arrays do, too
    manager.pull_blocks(CacheKey(1, req_id + 1), paged, [], [10, 11])  # a slot spread over blocks
    key = CacheKeyByIdAndIndex(1, cache_id, slot)
    manager.pull_cache(key, cache, 1, src_layer_range=range(0, 2), dst_layer_range=range(2, 4))
    # endregion
    assert (cache.numpy()[0][0] == 3).all()
    assert [tensor[1, 0, 0] for tensor in cache.numpy()] == [0] * 4 + [3] * 4
    assert (paged.numpy()[0][10:12] == 1).all()
    assert (paged.numpy()[0][32:, 0, 0] == np.arange(64)).all()


def limit(engine: LLMDataDist) -> None:
    """A time limit for one call."""
    manager = engine.cache_manager
    cache = manager.allocate_blocks_cache(PAGED)
    # region limit
    manager.pull_blocks(BlocksCacheKey(1), cache, [3], [10], timeout_in_millis=5000)
    # endregion
    assert (cache.numpy()[0][10] == 3).all()


if __name__ == "__main__":
    run(prompt, decoder)

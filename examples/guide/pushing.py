"""Writing into the caches of a peer."""

from __future__ import annotations

from collections.abc import Callable

from two_engines import link, run

from datadist import BlocksCacheKey, CacheDesc, CacheKeyByIdAndIndex, DataType, LLMDataDist

SLOTS = CacheDesc(4, [2, 16, 8], DataType.DT_FLOAT16)
PAGED = CacheDesc(4, [16, 16, 8], DataType.DT_FLOAT16)


def prompt(engine: LLMDataDist, meet: Callable[[], object]) -> None:
    """Push a slot and blocks."""
    link(engine)
    push(engine, int(engine.link_metadata(cluster_id=2)[2]))
    meet()


def push(engine: LLMDataDist, cache_id: int) -> None:
    """Both forms."""
    manager = engine.cache_manager
    cache, paged = manager.allocate_cache(SLOTS), manager.allocate_blocks_cache(PAGED)
    for tensor in cache.numpy() + paged.numpy():
        tensor[:] = 1
    slot = 1
    # region push
    manager.push_cache(CacheKeyByIdAndIndex(2, cache_id, slot), cache, src_batch_index=0)
    manager.push_blocks(BlocksCacheKey(2), paged, src_blocks=[3, 4], dst_blocks=[10, 11])
    # endregion


def decoder(engine: LLMDataDist, meet: Callable[[], object]) -> None:
    """Own the caches that are written."""
    manager = engine.cache_manager
    slots = manager.allocate_cache(SLOTS)
    paged = manager.allocate_blocks_cache(PAGED, BlocksCacheKey(2))
    for tensor in slots.numpy() + paged.numpy():
        tensor[:] = 0
    link(engine, str(slots.cache_id).encode())
    meet()
    assert [slot.max() for slot in slots.numpy()[0]] == [0, 1]
    assert paged.numpy()[0].max(axis=(1, 2)).nonzero()[0].tolist() == [10, 11]


if __name__ == "__main__":
    run(prompt, decoder, enable_remote_cache_accessible=True)

"""Transfers in the background."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from queue import SimpleQueue

from two_engines import link, run

from datadist import BlocksCacheKey, Cache, CacheDesc, DataType, LLMDataDist, TransferTask

DESC = CacheDesc(4, [16, 16, 8], DataType.DT_FLOAT16)


def prompt(engine: LLMDataDist, meet: Callable[[], object]) -> None:
    """Own a cache of ones."""
    cache = engine.cache_manager.allocate_blocks_cache(DESC, BlocksCacheKey(1))
    for tensor in cache.numpy():
        tensor[:] = 1
    link(engine)
    meet()


async def pull(engine: LLMDataDist, cache: Cache) -> None:
    """All that a task can do."""
    manager = engine.cache_manager
    arrived: SimpleQueue[TransferTask] = SimpleQueue()
    # region task
    task = manager.pull_blocks_async(BlocksCacheKey(1), cache, [3, 4], [10, 11])
    task.add_done_callback(arrived.put)  # called on a thread of the engine; must be short
    task.done()  # without waiting
    task.result(timeout=10)  # seconds; raises what the synchronous call raises
    await task  # in asyncio, without a thread of the program's
    # endregion
    assert arrived.get(timeout=10) is task


def decoder(engine: LLMDataDist, meet: Callable[[], object]) -> None:
    """Pull in asyncio."""
    cache = engine.cache_manager.allocate_blocks_cache(DESC)
    link(engine)
    asyncio.run(pull(engine, cache))
    assert (cache.numpy()[3][10:12] == 1).all()
    meet()


if __name__ == "__main__":
    run(prompt, decoder)

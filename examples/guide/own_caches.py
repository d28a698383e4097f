"""Caches of one engine: allocating, registering, copying; and errors."""

from __future__ import annotations

import numpy as np
from two_engines import POOL

import datadist
from datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    DataType,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    Placement,
)


def allocate(engine: LLMDataDist) -> None:
    """A cache of the pool."""
    manager = engine.cache_manager
    # region allocate
    desc = CacheDesc(8, [64, 16, 8, 128], DataType.DT_FLOAT16)  # 4 layers, 64 blocks of 16 tokens
    cache = manager.allocate_blocks_cache(desc, BlocksCacheKey(1))
    keys = cache.numpy()[0]  # zero-copy, shape and type of the description
    # endregion
    assert keys.shape == (64, 16, 8, 128)
    manager.deallocate_blocks_cache(cache)


def register(engine: LLMDataDist) -> None:
    """Caches over memory of NumPy."""
    manager = engine.cache_manager
    # region register
    arrays = [np.zeros([64, 16, 8, 128], np.float16) for _ in range(8)]
    desc = CacheDesc.from_tensors(arrays)
    cache = manager.register_blocks_cache(desc, arrays, BlocksCacheKey(1))
    addresses = [array.ctypes.data for array in arrays]  # of a torch tensor: tensor.data_ptr()
    other = manager.register_blocks_cache(desc, addresses, BlocksCacheKey(1, 1))  # the same memory
    # endregion
    manager.unregister_cache(other.cache_id)
    # region unregister
    manager.unregister_cache(cache.cache_id)  # by its id, while deallocate_* take the cache
    # endregion


def before() -> None:
    """Memory that is there before the engine."""
    # region empty
    kv = datadist.empty((8, 64, 16, 8, 128), np.float16)  # zeros; torch.from_numpy takes it
    engine = start()  # later: first the model, then an engine with its options
    desc = CacheDesc(8, [64, 16, 8, 128], DataType.DT_FLOAT16)
    addresses = [tensor.ctypes.data for tensor in kv]
    cache = engine.cache_manager.register_blocks_cache(desc, addresses, BlocksCacheKey(1))
    # endregion
    engine.cache_manager.unregister_cache(cache.cache_id)
    engine.finalize()


def copy(engine: LLMDataDist) -> None:
    """Copies inside an engine."""
    manager = engine.cache_manager
    shape, dtype = [4, 16, 8], DataType.DT_FLOAT16
    src, dst = (manager.allocate_cache(CacheDesc(2, shape, dtype)) for _ in range(2))
    cache = manager.allocate_blocks_cache(CacheDesc(2, [8, 16, 8], dtype))
    memory = [np.zeros(shape, np.float16) for _ in range(2)]
    addresses = [array.ctypes.data for array in memory]
    src.numpy()[0][0], cache.numpy()[0][0], cache.numpy()[0][3] = 1, 2, 3
    # region copy
    manager.copy_cache(dst, src, dst_batch_index=1, src_batch_index=0)
    manager.copy_blocks(cache, {0: [5, 6]})  # block 0 to 5 and 6; pairs in order, no block twice
    cpu = Cache.create_cpu_cache(CacheDesc(2, shape, dtype, Placement.HOST), addresses)
    manager.swap_blocks(cache, cpu, {3: 0})  # DEVICE block 3 to HOST block 0; one way
    # endregion
    assert (dst.numpy()[0][1] == 1).all()
    assert (cache.numpy()[0][5:7] == 2).all()
    assert (memory[0][0] == 3).all()


def fail(engine: LLMDataDist) -> None:
    """A call that fails, since nothing is linked."""
    manager = engine.cache_manager
    cache = manager.allocate_blocks_cache(CacheDesc(2, [16, 16, 8], DataType.DT_FLOAT16))
    # region errors
    try:
        manager.pull_blocks(BlocksCacheKey(9), cache, [3], [10])
    except LLMException as error:
        print(error)  # cluster 9 is not linked: ... (LLM_NOT_YET_LINK)
        print(error.status_code)  # LLMStatusCode.LLM_NOT_YET_LINK
        print(f"{error.status_code:#x}")  # 0x5010b007
    # endregion


def start() -> LLMDataDist:
    """An engine with a pool."""
    config = LLMConfig()
    config.enable_cache_manager = True
    config.mem_pool_cfg = POOL
    engine = LLMDataDist(LLMRole.PROMPT, 1)
    engine.init(config.generate_options())
    return engine


def main() -> None:
    """One after the other."""
    before()
    with start() as engine:
        for part in (allocate, register, copy, fail):
            part(engine)


if __name__ == "__main__":
    main()

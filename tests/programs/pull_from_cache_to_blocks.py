"""A contiguous slot of the prompt (1) spread over blocks of the decoder (2)."""

import time

import numpy as np
from common import arguments, barrier, base_config, peek, poke, rank_table

from llm_datadist import CacheDesc, CacheKey, DataType, LLMDataDist, LLMRole, RegisterMemStatus

args = arguments()
prompt = args.cluster_id == 1
datadist = LLMDataDist(LLMRole.PROMPT if prompt else LLMRole.DECODER, args.cluster_id)
config = base_config(enable_cache_manager=True, mem_pool_cfg='{"memory_size": 67108864}')
datadist.init(config.generate_options())
comm_id = datadist.link("link", {1: 0, 2: 1}, rank_table())
while datadist.query_register_mem_status(comm_id) != RegisterMemStatus.OK:
    time.sleep(0.05)
manager = datadist.cache_manager
if prompt:
    cache = manager.allocate_cache(CacheDesc(2, [1, 1024], DataType.DT_FLOAT), [CacheKey(1, 7)])
    for index, address in enumerate(cache.tensor_addrs):
        poke(address, np.arange(1024) + 5000 * index)
    barrier(args, "allocated")
    barrier(args, "pulled")
    manager.deallocate_cache(cache)
else:
    cache = manager.allocate_blocks_cache(CacheDesc(2, [8, 256], DataType.DT_FLOAT))
    barrier(args, "allocated")
    manager.pull_blocks(CacheKey(1, 7), cache, src_blocks=[], dst_blocks=[6, 0, 3, 2])
    for index, address in enumerate(cache.tensor_addrs):
        blocks = peek(address, 2048).reshape(8, 256)
        for place, block in enumerate([6, 0, 3, 2]):
            assert (blocks[block] == np.arange(256) + 256 * place + 5000 * index).all()
        assert not blocks[[1, 4, 5, 7]].any()
    barrier(args, "pulled")
    manager.deallocate_blocks_cache(cache)
datadist.unlink(comm_id)
datadist.finalize()
print("done")

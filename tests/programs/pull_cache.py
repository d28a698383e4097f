"""Contiguous pull: the prompt (1) allocates a cache with a key per slot, the decoder (2) pulls them."""

import time

import numpy as np
from common import arguments, barrier, base_config, peek, poke, rank_table

from llm_datadist import CacheDesc, CacheKey, DataType, LLMDataDist, LLMRole, RegisterMemStatus

args = arguments()
role = LLMRole.PROMPT if args.cluster_id == 1 else LLMRole.DECODER
datadist = LLMDataDist(role, args.cluster_id)
config = base_config(enable_cache_manager=True, mem_pool_cfg='{"memory_size": 67108864}')
datadist.init(config.generate_options())
comm_id = datadist.link("link", {1: 0, 2: 1}, rank_table())
while (status := datadist.query_register_mem_status(comm_id)) != RegisterMemStatus.OK:
    assert status == RegisterMemStatus.PREPARING
    time.sleep(0.05)
manager = datadist.cache_manager
desc = CacheDesc(num_tensors=4, shape=[4, 128], data_type=DataType.DT_FLOAT)
keys = [CacheKey(prompt_cluster_id=1, req_id=i, model_id=0) for i in range(4)]
if role == LLMRole.PROMPT:
    cache = manager.allocate_cache(desc, keys)
    for index, address in enumerate(cache.tensor_addrs):
        poke(address, np.arange(512) + 1000 * index)
    barrier(args, "allocated")
    barrier(args, "pulled")
    datadist.unlink(comm_id)
    for key in keys:
        manager.remove_cache_key(key)
    manager.deallocate_cache(cache)
else:
    cache = manager.allocate_cache(desc)
    barrier(args, "allocated")
    for slot in range(4):
        manager.pull_cache(keys[slot], cache, batch_index=3 - slot)
    for index, address in enumerate(cache.tensor_addrs):
        slots = (np.arange(512) + 1000 * index).reshape(4, 128)
        assert (peek(address, 512).reshape(4, 128) == slots[::-1]).all()
    barrier(args, "pulled")
    datadist.unlink(comm_id)
    manager.deallocate_cache(cache)
datadist.finalize()
print("done")

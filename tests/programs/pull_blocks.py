"""Paged pull between registered tensors, then blocks swapped out to the host and in again."""

import time

from common import Tensors, arguments, barrier, base_config, rank_table

import llm_datadist
from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    DataType,
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
    Placement,
)

args = arguments()
prompt = args.cluster_id == 1
datadist = LLMDataDist(LLMRole.PROMPT if prompt else LLMRole.DECODER, args.cluster_id)
datadist.init(base_config(enable_cache_manager=True).generate_options())
manager = datadist.cache_manager
tensors = Tensors(args.tensors, 2, (10, 128), 1.0 if prompt else 50.0)
desc = CacheDesc(2, [10, 128], DataType.DT_FLOAT, placement=Placement.DEVICE)
cache = manager.register_blocks_cache(
    desc, tensors.addresses, BlocksCacheKey(args.cluster_id, 0) if prompt else None
)
comm_id = datadist.link("link", {1: 0, 2: 1}, rank_table())
while datadist.query_register_mem_status(comm_id) != llm_datadist.RegisterMemStatus.OK:
    time.sleep(0.05)
if prompt:
    for tensor in tensors.all:  # after the registration
        tensor[4] = 4.0
barrier(args, "filled")
if not prompt:
    key = BlocksCacheKey(prompt_cluster_id=1, model_id=0)
    manager.pull_blocks(key, cache, src_blocks=[4, 5, 6], dst_blocks=[0, 1, 9])
    assert [tensors.row(1, row) for row in (0, 1, 9, 2)] == [4.0, 2.0, 2.0, 51.0]
    host = Tensors(args.tensors, 2, (10, 128), 0.0)
    cpu_desc = CacheDesc(2, [10, 128], DataType.DT_FLOAT, placement=Placement.HOST)
    cpu_cache = Cache.create_cpu_cache(cpu_desc, host.addresses)
    manager.swap_blocks(cache, cpu_cache, {0: 0, 1: 1})
    assert [host.row(0, 0), host.row(0, 1), host.row(0, 2)] == [4.0, 1.0, 0.0]
    manager.swap_blocks(cpu_cache, cache, {0: 7})
    assert tensors.row(0, 7) == 4.0
    try:
        manager.pull_blocks(BlocksCacheKey(1, 5), cache, [0], [0])
    except llm_datadist.LLMException as error:
        assert error.status_code == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    else:
        raise AssertionError("an unknown model_id was pulled")
barrier(args, "pulled")
datadist.unlink(comm_id)
manager.unregister_cache(cache.cache_id)
datadist.finalize()
print("done")

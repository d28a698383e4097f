"""Pushes both ways over a link by address: the decoder (2) listens, both push a cache and blocks."""

from common import Tensors, arguments, barrier, base_config

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKeyByIdAndIndex,
    DataType,
    LLMClusterInfo,
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
)

args = arguments()
me, other = args.cluster_id, 3 - args.cluster_id
config = base_config(local_comm_res="", listen_ip_info=f"127.0.0.1:{args.ports[me - 1]}")
datadist = LLMDataDist(LLMRole.PROMPT if me == 1 else LLMRole.DECODER, me)
datadist.init(config.generate_options())
manager = datadist.cache_manager
plain = Tensors(args.tensors, 2, (4, 64), 10.0 * me)
paged = Tensors(args.tensors, 4, (10, 64), 100.0 * me)
cache = manager.register_cache(CacheDesc(2, [4, 64], DataType.DT_FLOAT), plain.addresses)
blocks = manager.register_blocks_cache(
    CacheDesc(4, [10, 64], DataType.DT_FLOAT), paged.addresses, BlocksCacheKey(me, 0)
)
barrier(args, "registered")
info = LLMClusterInfo()
info.remote_cluster_id = other
info.append_local_ip_info("127.0.0.1", 0)
info.append_remote_ip_info("127.0.0.1", args.ports[other - 1])
if me == 1:
    ret, rets = datadist.link_clusters([info], 20_000)
    assert ret == LLMStatusCode.LLM_SUCCESS, rets
barrier(args, "linked")
key = CacheKeyByIdAndIndex(cluster_id=other, cache_id=1, batch_index=me)
manager.push_cache(key, cache, src_batch_index=0)
manager.push_blocks(
    BlocksCacheKey(other, 0), blocks, src_blocks=[0, 1], dst_blocks=[me + 2, me + 5]
)
manager.push_blocks(
    BlocksCacheKey(other, 0),
    blocks,
    src_blocks=[0],
    dst_blocks=[9],
    src_layer_range=range(0, 1),
    dst_layer_range=range(3, 4),
    tensor_num_per_layer=1,
)
barrier(args, "pushed")
assert [plain.row(1, row) for row in (other, me)] == [10.0 * other + 1, 10.0 * me + 1]
assert [paged.row(2, row) for row in (other + 2, other + 5)] == [100.0 * other + 2] * 2
assert [paged.row(3, 9), paged.row(2, 9)] == [100.0 * other, 100.0 * me + 2]
ret, _ = datadist.unlink_clusters([info], 20_000, force=True)
assert ret == LLMStatusCode.LLM_SUCCESS
manager.unregister_cache(cache.cache_id)
manager.unregister_cache(blocks.cache_id)
datadist.finalize()
print("done")

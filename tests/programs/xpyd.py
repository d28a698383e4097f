"""Two prompts (1, 2) listen; two decoders (3, 4) link with both in one call and pull from each."""

from common import Tensors, arguments, barrier, base_config

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    DataType,
    LLMClusterInfo,
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
)

args = arguments()
me = args.cluster_id
prompt = me <= 2
config = base_config(local_comm_res="")
if prompt:
    config.listen_ip_info = f"127.0.0.1:{args.ports[me - 1]}"
datadist = LLMDataDist(LLMRole.PROMPT if prompt else LLMRole.DECODER, me)
datadist.init(config.generate_options())
tensors = Tensors(args.tensors, 2, (10, 64), 100.0 * me)
cache = datadist.cache_manager.register_blocks_cache(
    CacheDesc(2, (10, 64), DataType.DT_FLOAT), tensors.addresses, BlocksCacheKey(me, 0)
)
barrier(args, "registered")
if not prompt:
    infos = []
    for cluster in (1, 2):
        info = LLMClusterInfo()
        info.remote_cluster_id = cluster
        info.append_local_ip_info("127.0.0.1", 26000)
        info.append_remote_ip_info("127.0.0.1", args.ports[cluster - 1])
        infos.append(info)
    ret, rets = datadist.link_clusters(infos, timeout=20_000)
    assert ret == LLMStatusCode.LLM_SUCCESS, rets
    for cluster in (1, 2):
        key = BlocksCacheKey(cluster_id=cluster, model_id=0)
        datadist.cache_manager.pull_blocks(key, cache, [0, 1], [cluster, cluster + 4])
    for tensor in range(2):
        for cluster in (1, 2):
            assert tensors.row(tensor, cluster) == 100.0 * cluster + tensor
            assert tensors.row(tensor, cluster + 4) == 100.0 * cluster + tensor
    ret, rets = datadist.unlink_clusters(infos, timeout=20_000)
    assert ret == LLMStatusCode.LLM_SUCCESS, rets
barrier(args, "pulled")
datadist.cache_manager.unregister_cache(cache.cache_id)
datadist.finalize()
print("done")

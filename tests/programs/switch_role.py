"""Roles switch: 2 links with the listener 1 and pulls; 1 pushes back; then 2 listens and 1 links."""

from common import Tensors, arguments, barrier, base_config

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    DataType,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
)

args = arguments()
me, other = args.cluster_id, 3 - args.cluster_id
config = base_config(local_comm_res="")
if me == 1:
    config.listen_ip_info = f"127.0.0.1:{args.ports[0]}"
datadist = LLMDataDist(LLMRole.PROMPT if me == 1 else LLMRole.DECODER, me)
datadist.init(config.generate_options())
manager = datadist.cache_manager
tensors = Tensors(args.tensors, 2, (10, 64), 100.0 * me)
cache = manager.register_blocks_cache(
    CacheDesc(2, [10, 64], DataType.DT_FLOAT), tensors.addresses, BlocksCacheKey(me, 0)
)
barrier(args, "registered")


def link_and_pull(port: int, row: int) -> None:
    info = LLMClusterInfo()
    info.remote_cluster_id = other
    info.append_local_ip_info("127.0.0.1", 0)
    info.append_remote_ip_info("127.0.0.1", port)
    assert datadist.link_clusters([info], 20_000)[0] == LLMStatusCode.LLM_SUCCESS
    manager.pull_blocks(BlocksCacheKey(other, 0), cache, [0], [row])
    assert tensors.row(1, row) == 100.0 * other + 1
    barrier(args, f"linked {port}")
    barrier(args, f"pushed {port}")
    assert tensors.row(0, row + 1) == 100.0 * other
    assert datadist.unlink_clusters([info], 20_000)[0] == LLMStatusCode.LLM_SUCCESS
    barrier(args, f"unlinked {port}")


def be_linked(port: int, row: int) -> None:
    barrier(args, f"linked {port}")
    manager.push_blocks(
        BlocksCacheKey(other, 0), cache, src_blocks=[0], dst_blocks=[row], tensor_num_per_layer=1
    )
    barrier(args, f"pushed {port}")
    barrier(args, f"unlinked {port}")


if me == 1:
    be_linked(args.ports[0], 3)
    datadist.switch_role(LLMRole.DECODER)
    barrier(args, "switched")
    link_and_pull(args.ports[1], 5)
else:
    link_and_pull(args.ports[0], 2)
    options = LLMConfig()
    options.listen_ip_info = f"127.0.0.1:{args.ports[1]}"
    datadist.switch_role(LLMRole.PROMPT, options.generate_options())
    barrier(args, "switched")
    be_linked(args.ports[1], 6)
manager.unregister_cache(cache.cache_id)
datadist.finalize()
print("done")

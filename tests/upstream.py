"""Of upstream (LLM-DataDist API): parameters of public calls, without ``self``, and an example."""

from __future__ import annotations

SIGNATURES = {
    "LLMException": "*args, status_code=LLMStatusCode.LLM_SUCCESS",
    "Status": "status",
    "Status.is_ok": "",
    "LLMClusterInfo": "",
    "LLMClusterInfo.append_local_ip_info": "ip, port",
    "LLMClusterInfo.append_remote_ip_info": "ip, port",
    "CacheDesc": (
        "num_tensors, shape, data_type, placement=Placement.DEVICE, batch_dim_index=0, "
        "seq_len_dim_index=-1, kv_tensor_format=None"
    ),
    "CacheDesc.update_dim": "dim_index, dim_value",
    "CacheKey": "*args, **kwargs",
    "BlocksCacheKey": "*args, **kwargs",
    "CacheKeyByIdAndIndex": "cluster_id, cache_id, batch_index=0",
    "Cache": "cache_id, cache_desc, tensor_addrs, cache_manager, is_registered, is_blocks_cache",
    "Cache.create_cpu_cache": "cache_desc, addrs",
    "KvCache": "cache_id, cache_desc, per_device_tensor_addrs, kv_cache_manager",
    "KvCache.create_cpu_cache": "cache_desc, addrs",
    "MemInfo": "mem_type, addr, size",
    "LayerSynchronizer": "",
    "LayerSynchronizer.synchronize_layer": "layer_index, timeout_in_millis",
    "TransferConfig": "dst_cluster_id, dst_addrs, src_layer_range=None, src_batch_index=0",
    "TransferWithCacheKeyConfig": (
        "cache_key, src_layer_range=None, dst_layer_range=None, src_batch_index=0"
    ),
    "CacheTask": "transfer_async_task",
    "CacheTask.synchronize": "timeout_in_millis=None",
    "CacheTask.get_results": "timeout_in_millis=None",
    "LLMConfig": "",
    "LLMConfig.generate_options": "",
    "LLMConfig.gen_options": "",
    "LLMDataDist": "role, cluster_id",
    "LLMDataDist.init": "options",
    "LLMDataDist.finalize": "",
    "LLMDataDist.link": "comm_name, cluster_rank_info, rank_table",
    "LLMDataDist.unlink": "comm_id",
    "LLMDataDist.query_register_mem_status": "comm_id",
    "LLMDataDist.check_link_status": "remote_cluster_id",
    "LLMDataDist.link_clusters": "clusters, timeout=3000",
    "LLMDataDist.unlink_clusters": "clusters, timeout=3000, force=False",
    "LLMDataDist.switch_role": "role, switch_options=None",
    "CacheManager": "llm_datadist, options",
    "CacheManager.allocate_cache": "cache_desc, cache_keys=()",
    "CacheManager.allocate_blocks_cache": "cache_desc, blocks_cache_key=None",
    "CacheManager.deallocate_cache": "cache",
    "CacheManager.deallocate_blocks_cache": "cache",
    "CacheManager.remove_cache_key": "cache_key",
    "CacheManager.register_cache": "cache_desc, addrs, cache_keys=(), remote_accessible=None",
    "CacheManager.register_blocks_cache": (
        "cache_desc, addrs, blocks_cache_key=None, remote_accessible=None"
    ),
    "CacheManager.unregister_cache": "cache_id",
    "CacheManager.pull_cache": "cache_key, cache, batch_index=0, size=-1, **kwargs",
    "CacheManager.pull_blocks": "src_cache_key, dst_cache, src_blocks=(), dst_blocks=(), **kwargs",
    "CacheManager.push_cache": (
        "dst_cache_key, src_cache, src_batch_index=0, src_layer_range=None, dst_layer_range=None, "
        "size=-1, tensor_num_per_layer=2"
    ),
    "CacheManager.push_blocks": (
        "dst_cache_key, src_cache, src_blocks=(), dst_blocks=(), src_layer_range=None, "
        "dst_layer_range=None, tensor_num_per_layer=2"
    ),
    "CacheManager.transfer_cache_async": (
        "src_cache, layer_synchronizer, transfer_configs, src_block_indices=None, "
        "dst_block_indices=None, dst_block_memory_size=None"
    ),
    "CacheManager.copy_cache": (
        "dst, src, dst_batch_index=0, src_batch_index=0, offset=0, size=-1, req_id=None"
    ),
    "CacheManager.copy_blocks": "cache, copy_block_info",
    "CacheManager.swap_blocks": "src_cache, dst_cache, src_to_dst",
    "CacheManager.remap_registered_memory": "mem_infos",
    "CacheManager.check_cache_key": "cache_key",
    "CacheManager.set_is_call_linked": "",
}

_LAYERS = "*, src_layer_range=None, dst_layer_range=None, tensor_num_per_layer=2"
_MORE = "timeout_in_millis=None, notify=None"

DIFFERENT = {
    "CacheDesc": (
        35,
        SIGNATURES["CacheDesc"] + ", *, tensors_per_layer=2, block_stride=None",
    ),
    "CacheManager.pull_cache": (
        34,
        f"cache_key, cache, batch_index=0, size=-1, {_LAYERS}, {_MORE}",
    ),
    "CacheManager.pull_blocks": (
        33,
        f"src_cache_key, dst_cache, src_blocks=(), dst_blocks=(), {_LAYERS}, token=None, "
        f"release=False, {_MORE}",
    ),
    **{
        f"CacheManager.{name}": (34, f"{SIGNATURES[f'CacheManager.{name}']}, *, {_MORE}")
        for name in ("push_cache", "push_blocks")
    },
    "CacheManager.transfer_cache_async": (
        34,
        f"{SIGNATURES['CacheManager.transfer_cache_async']}, *, timeout_in_millis=None",
    ),
    "CacheManager": (27, "engine, refusal, one_sided"),
    "Cache": (
        27,
        "cache_id, cache_desc, tensor_addrs, is_blocks_cache, *, pooled=False, keeper=None, "
        "addressable=True, owner=None, release=None, made=None, memory=None",
    ),
    "LLMDataDist.link": (35, SIGNATURES["LLMDataDist.link"] + ", *, metadata=None"),
    "LLMDataDist.link_clusters": (
        35,
        SIGNATURES["LLMDataDist.link_clusters"] + ", *, metadata=None",
    ),
    "KvCache": (27, "cache_id, cache_desc, per_device_tensor_addrs, is_blocks_cache=False"),
    "CacheTask": (27, "job"),
}
"""Ours where they differ, and the number of the deviation that says so in docs/api.md."""

CONTRACT_TABLE = """
{
    "server_count": "2",
    "server_list": [
        {
            "device": [
                {
                    "device_id": "0",
                    "device_ip": "x.x.x.x",
                    "rank_id": "0"
                },
            ],
            "server_id": "xxxx"
        },
        {
            "device": [
                {
                    "device_id": "0",
                    "device_ip": "x.x.x.x",
                    "rank_id": "1"
                },
            ],
            "server_id": "xxxx"
        }
    ],
    "status": "completed",
    "version": "1.0"
}
"""
"""The rank table of the documented example."""

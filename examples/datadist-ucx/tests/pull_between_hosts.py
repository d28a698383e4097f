"""A program of two hosts: cluster 1 fills a cache, cluster 2 pulls it. Run it with the cluster's id."""

from __future__ import annotations

import json
import sys

import numpy as np

from datadist import CacheDesc, CacheKey, DataType, LLMConfig, LLMDataDist, LLMRole

SHAPE = [2, 1 << 20]


def main(me: int) -> None:
    """Link, pull, compare."""
    config = LLMConfig()
    config.enable_cache_manager = True
    config.mem_pool_cfg = '{"memory_size": 67108864}'
    config.transfer_backend = "ucx"
    config.link_total_time = 60
    config.sync_kv_timeout = 20000
    options = config.generate_options() | {"datadist.ucx.device": "eth0"}
    servers = [
        {"server_id": f"10.99.0.{r + 1}", "device": [{"device_id": "0", "rank_id": str(r)}]}
        for r in (0, 1)
    ]
    table = {"version": "1.0", "status": "completed", "server_count": "2", "server_list": servers}
    with LLMDataDist(LLMRole.PROMPT if me == 1 else LLMRole.DECODER, me) as engine:
        engine.init(options)
        content = np.arange(SHAPE[0] * SHAPE[1], dtype=np.int32).reshape(SHAPE)
        keys = [CacheKey(1, 42), CacheKey(1, 43)] if me == 1 else []
        cache = engine.cache_manager.allocate_cache(CacheDesc(2, SHAPE, DataType.DT_INT32), keys)
        for array in cache.numpy():
            array[:] = content if me == 1 else -1
        engine.wait_link(engine.link("hosts", {1: 0, 2: 1}, json.dumps(table)))
        if me == 2:
            engine.cache_manager.pull_cache(CacheKey(1, 43), cache, 0)
            for array in cache.numpy():
                assert (array[0] == content[1]).all()
                assert (array[1] == -1).all()
            print("pulled", flush=True)
        sys.stdin.read()


main(int(sys.argv[1]))

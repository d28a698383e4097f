"""A cache that engines of several hosts pull: `python move.py CLUSTER ADDRESS RANK_TABLE`."""

# region program
import json
import select
import sys
from pathlib import Path

from datadist import BlocksCacheKey, CacheDesc, DataType, LLMConfig, LLMDataDist, LLMRole, Placement

me, address, table = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]).read_text()
size = sum(len(server["device"]) for server in json.loads(table)["server_list"])
config = LLMConfig()
config.enable_cache_manager = True
config.host_mem_pool_cfg = '{"memory_size": 67108864}'
config.listen_ip_info = f"{address}:{26000 + me}"  # an address of this host
config.link_total_time = 60  # seconds until a link that is not complete fails
config.sync_kv_timeout = 10000  # milliseconds that a pull may take

with LLMDataDist(LLMRole.PROMPT if me == 1 else LLMRole.DECODER, me) as engine:
    engine.init(config.generate_options())
    print(f"cluster {me} uses {engine.backend}", flush=True)
    desc = CacheDesc(2, [4, 1 << 18], DataType.DT_FLOAT16, Placement.HOST)
    key = BlocksCacheKey(1, 0)
    cache = engine.cache_manager.allocate_blocks_cache(desc, key if me == 1 else None)
    for number, array in enumerate(cache.numpy(), 1):
        array[:] = number if me == 1 else 0
    comm_id = engine.link("hosts", {rank + 1: rank for rank in range(size)}, table)
    engine.wait_link(comm_id)
    print("linked", flush=True)
    if me == 1:
        done = 0
        while done < size - 1:
            if not select.select([engine.messages_fileno()], [], [], 60)[0]:
                sys.exit("no cluster has pulled for 60 s")
            for message in engine.messages():
                done += 1
                print(f"cluster {message.cluster_id} has {message.data.decode()}", flush=True)
    else:
        engine.cache_manager.pull_blocks(key, cache, [0, 1, 2, 3], [0, 1, 2, 3])
        assert all((array == number).all() for number, array in enumerate(cache.numpy(), 1))
        print("pulled 4 MiB, all of it right", flush=True)
        engine.send_message(1, b"4 MiB")
    engine.unlink(comm_id)
# endregion

"""The first program: cluster 1 owns a cache, cluster 2 pulls it. `python first.py 1`, and 2 elsewhere."""

# region example
import select
import sys
from pathlib import Path

from datadist import CacheDesc, CacheKey, DataType, LLMDataDist, LLMRole

me, table = int(sys.argv[1]), Path("ranks.json").read_text()
options = {"llm.EnableCacheManager": "1", "llm.LinkTotalTime": "600"}
options["llm.MemPoolConfig"] = '{"memory_size": 67108864}'
with LLMDataDist(LLMRole.PROMPT if me == 1 else LLMRole.DECODER, me) as engine:
    engine.init(options)
    desc, key = CacheDesc(2, [1, 1024], DataType.DT_FLOAT16), CacheKey(1, 42)
    cache = engine.cache_manager.allocate_cache(desc, [key] if me == 1 else [])
    cache.numpy()[0][:] = me
    print(f"cluster {me} waits up to 600 s for cluster {3 - me}", flush=True)
    engine.wait_link(engine.link("example", {1: 0, 2: 1}, table))
    if me == 2:
        engine.cache_manager.pull_cache(key, cache, notify=b"pulled")
        print(cache.numpy()[0][0, :4])  # [1. 1. 1. 1.]
    elif not select.select([engine.messages_fileno()], [], [], 60)[0]:
        sys.exit("cluster 2 has not pulled within 60 s")
# endregion

"""A prompt engine: computes the KV of requests, and lends the blocks to a decoder. `python prompt.py`."""

# region prompt
import select
import sys
from pathlib import Path

from datadist import CacheDesc, CacheKey, DataType, LLMConfig, LLMDataDist, LLMRole

BLOCKS, LAYERS = 64, 4
DESC = CacheDesc(2 * LAYERS, [BLOCKS, 16, 8, 128], DataType.DT_FLOAT16)  # K and V of each layer


def start(role: LLMRole, cluster: int) -> LLMDataDist:
    """An engine with a pool; the decoder makes its own with this function too."""
    config = LLMConfig()
    config.enable_cache_manager = True
    config.mem_pool_cfg = '{"memory_size": 67108864}'
    config.link_total_time = 600  # seconds to wait for the other program
    engine = LLMDataDist(role, cluster)
    engine.init(config.generate_options())
    return engine


def link(engine: LLMDataDist) -> None:
    """Both programs call this, in any order: cluster 1 is rank 0 of the table, cluster 2 is rank 1."""
    print("waiting up to 600 s for the other program", flush=True)
    engine.wait_link(engine.link("tutorial", {1: 0, 2: 1}, Path("ranks.json").read_text()))


def serve(engine: LLMDataDist) -> None:
    """Compute what the decoder asks for, until it has unlinked."""
    manager = engine.cache_manager
    cache = manager.allocate_blocks_cache(DESC)
    free = list(range(BLOCKS))
    link(engine)
    watched = [engine.messages_fileno(), manager.ended_grants_fileno(), engine.link_events_fileno()]
    while select.select(watched, [], [], 60)[0]:
        for grant in manager.ended_grants():
            print(f"request {grant.key.req_id}: {grant.state.name}", flush=True)
            free += grant.blocks
        for message in engine.messages():
            request, length = map(int, message.data.split())
            blocks = [free.pop() for _ in range(length)]
            for tensor in cache.numpy():
                tensor[blocks] = request  # stands for the model
            manager.grant_blocks(cache, CacheKey(1, request), blocks)
            engine.send_message(2, b"computed")
        if any(event.kind.name != "OK" for event in engine.link_events()):
            return
    sys.exit("nothing has come for 60 s")


if __name__ == "__main__":
    with start(LLMRole.PROMPT, 1) as engine:
        serve(engine)
# endregion

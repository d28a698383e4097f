"""Each layer is sent while the next one is computed: `python layers.py 1`, and `python layers.py 2`."""

# region script
import select
import sys
from pathlib import Path
from threading import Event

from datadist import (
    BlocksCacheKey,
    CacheDesc,
    DataType,
    LayerSynchronizer,
    LLMConfig,
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
    TransferWithCacheKeyConfig,
)

LAYERS = 8
DESC = CacheDesc(2 * LAYERS, [16, 16, 8, 128], DataType.DT_FLOAT16)  # K and V of each layer


# region computed
class Computed(LayerSynchronizer):
    """Says when a layer is final. The engine asks before it sends the layer, on a thread of its own."""

    def __init__(self) -> None:
        self.events = [Event() for _ in range(LAYERS)]

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        """Wait until K and V of the layer are final; False ends the task."""
        return self.events[layer_index].wait(60)


# endregion
def send(engine: LLMDataDist) -> None:
    """Compute all layers of blocks 3 and 4; each one is sent while the next one is computed."""
    cache = engine.cache_manager.allocate_blocks_cache(DESC)
    link(engine)
    computed = Computed()
    # region transfer
    target = TransferWithCacheKeyConfig(BlocksCacheKey(2), range(LAYERS), range(LAYERS))
    task = engine.cache_manager.transfer_cache_async(cache, computed, [target], [3, 4], [10, 11])
    for layer, event in enumerate(computed.events):
        for tensor in cache.numpy()[2 * layer : 2 * layer + 2]:
            tensor[3:5] = layer + 1  # stands for the model
        event.set()
    task.result(timeout=60)  # raises the first failure
    # endregion
    assert task.synchronize() is LLMStatusCode.LLM_SUCCESS
    engine.send_message(2, b"all layers are there")
    print(f"sent {LAYERS} layers", flush=True)


def take(engine: LLMDataDist) -> None:
    """Own the cache that is written, and wait for the message."""
    cache = engine.cache_manager.allocate_blocks_cache(DESC, BlocksCacheKey(2))
    link(engine)
    if not select.select([engine.messages_fileno()], [], [], 60)[0]:
        sys.exit("the layers have not come within 60 s")
    for number, tensor in enumerate(cache.numpy()):
        assert (tensor[10:12] == number // 2 + 1).all()
    print(f"{LAYERS} layers of two blocks are here", flush=True)


def link(engine: LLMDataDist) -> None:
    """Both call it, in any order."""
    print("waiting up to 600 s for the other program", flush=True)
    engine.wait_link(engine.link("layers", {1: 0, 2: 1}, Path("ranks.json").read_text()))


if __name__ == "__main__":
    me = int(sys.argv[1])
    config = LLMConfig()
    config.enable_cache_manager = True
    config.enable_remote_cache_accessible = True  # at both ends: peers may write
    config.mem_pool_cfg = '{"memory_size": 67108864}'
    config.link_total_time = 600  # seconds to wait for the other program
    with LLMDataDist(LLMRole.PROMPT if me == 1 else LLMRole.DECODER, me) as engine:
        engine.init(config.generate_options())
        send(engine) if me == 1 else take(engine)
# endregion

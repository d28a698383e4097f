"""The whole KV cache of an engine in the pool: allocated as torch tensors, pulled without a copy.

Two processes. Each allocates one buffer in which the layers of a model are interleaved, block by
block, with K and V of a layer in one tensor, as serving engines do. The decoder pulls some blocks of
all layers, and torch sees them at once. Over shm the pool is mapped: no right to trace processes is
needed (ptrace), also between containers that share nothing but the directory of the engines.

    python kv_in_pool.py
"""

from __future__ import annotations

import json
import multiprocessing
from multiprocessing.synchronize import Barrier

import torch

from datadist import BlocksCacheKey, CacheDesc, DataType, LLMConfig, LLMDataDist, LLMRole

LAYERS, BLOCKS, HEADS, TOKENS, HEAD_DIM = 4, 32, 2, 16, 64
PROMPT, DECODER = 1, 2
SECONDS = 60.0
"""How long one waits for the other, which may be killed."""
TABLE = json.dumps(
    {
        "version": "1.0",
        "status": "completed",
        "server_count": "1",
        "server_list": [
            {
                "server_id": "here",
                "device": [{"device_id": str(rank), "rank_id": str(rank)} for rank in range(2)],
            }
        ],
    }
)


def layers_of(buffer: torch.Tensor) -> list[torch.Tensor]:
    """The tensor of each layer: blocks that lie apart by those of the other layers."""
    return [buffer[:, layer] for layer in range(LAYERS)]


def run(cluster: int, barrier: Barrier) -> None:
    """One engine; if it fails, the other one does not wait for it."""
    try:
        serve(cluster, barrier)
    except BaseException:
        barrier.abort()
        raise


def serve(cluster: int, barrier: Barrier) -> None:
    """The prompt fills blocks, the decoder pulls them."""
    config = LLMConfig()
    config.enable_cache_manager = True
    config.mem_pool_cfg = json.dumps({"memory_size": 64 << 20})
    with LLMDataDist(LLMRole.PROMPT if cluster == PROMPT else LLMRole.DECODER, cluster) as engine:
        engine.init(config.generate_options())
        manager = engine.cache_manager
        tensor = manager.allocate_tensor(
            [BLOCKS, LAYERS, HEADS, TOKENS, 2 * HEAD_DIM], DataType.DT_BF16
        )
        kv = torch.from_dlpack(tensor)
        kv.zero_()
        del tensor  # the memory is kept by every tensor over it
        layers = layers_of(kv)
        desc = CacheDesc.from_tensors(layers, tensors_per_layer=1)
        key = BlocksCacheKey(cluster)
        cache = manager.register_blocks_cache(desc, layers, key)
        if cluster == PROMPT:
            for block in (3, 4):
                kv[block] = block
        engine.wait_link(engine.link("example", {PROMPT: 0, DECODER: 1}, TABLE))
        if cluster == DECODER:
            manager.pull_blocks(BlocksCacheKey(PROMPT), cache, [3, 4], [10, 20])
            assert (kv[10] == 3).all()
            assert (kv[20] == 4).all()
            assert kv[:10].count_nonzero() == kv[11:20].count_nonzero() == 0
            print("blocks 3 and 4 of all layers are here")
        barrier.wait(SECONDS)  # the prompt waits until the decoder has pulled
        manager.unregister_cache(cache.cache_id)


def main() -> None:
    """Start both engines."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    both = [context.Process(target=run, args=(each, barrier)) for each in (PROMPT, DECODER)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    raise SystemExit(max(abs(process.exitcode or 0) for process in both))


if __name__ == "__main__":
    main()

"""Tensors of torch: views of caches, layouts, the whole KV cache in the pool."""

from __future__ import annotations

import torch
from two_engines import POOL

from datadist import BlocksCacheKey, CacheDesc, DataType, LLMConfig, LLMDataDist, LLMRole


def view(engine: LLMDataDist) -> None:
    """A tensor of a cache as a tensor of torch."""
    manager = engine.cache_manager
    cache = manager.allocate_blocks_cache(CacheDesc(8, [64, 16, 8, 128], DataType.DT_BF16))
    # region view
    values = torch.from_dlpack(cache.tensors[1])  # zero-copy, too; bfloat16 stays bfloat16
    # endregion
    assert (values.shape, values.dtype) == ((64, 16, 8, 128), torch.bfloat16)
    manager.deallocate_blocks_cache(cache)


def layout(engine: LLMDataDist) -> None:
    """Layers that lie between each other's blocks."""
    manager = engine.cache_manager
    # region layout
    buffer = torch.zeros(64, 4, 8, 16, 256, dtype=torch.bfloat16)  # blocks, layers, ...; K beside V
    layers = [buffer[:, layer] for layer in range(4)]
    desc = CacheDesc.from_tensors(layers, tensors_per_layer=1)  # block_stride: 4 blocks, in bytes
    cache = manager.register_blocks_cache(desc, layers, BlocksCacheKey(1))
    # endregion
    assert desc.block_stride == 4 * layers[0][0].nbytes
    manager.unregister_cache(cache.cache_id)


def in_pool(engine: LLMDataDist) -> None:
    """The same buffer, in the pool."""
    manager = engine.cache_manager
    # region pool
    kv = torch.from_dlpack(manager.allocate_tensor([64, 4, 8, 16, 256], DataType.DT_BF16))
    layers = [kv[:, layer] for layer in range(4)]
    desc = CacheDesc.from_tensors(layers, tensors_per_layer=1)
    cache = manager.register_blocks_cache(desc, layers)
    # endregion
    manager.unregister_cache(cache.cache_id)


def context(engine: LLMDataDist) -> None:
    """Tensors whose memory peers can map."""
    manager = engine.cache_manager
    # region memory
    from datadist.torch_memory import TorchMemory

    with TorchMemory():  # torch.empty, zeros, ones and full of 1 MiB or more, on the CPU
        kv = [torch.zeros(64, 16, 8, 128, dtype=torch.bfloat16) for _ in range(8)]
    # endregion
    cache = manager.register_blocks_cache(CacheDesc.from_tensors(kv), kv, BlocksCacheKey(1))
    manager.unregister_cache(cache.cache_id)


def main() -> None:
    """One after the other."""
    config = LLMConfig()
    config.enable_cache_manager = True
    config.mem_pool_cfg = POOL
    with LLMDataDist(LLMRole.PROMPT, 1) as engine:
        engine.init(config.generate_options())
        for part in (view, layout, in_pool, context):
            part(engine)


if __name__ == "__main__":
    main()

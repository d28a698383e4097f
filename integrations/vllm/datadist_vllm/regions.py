"""vLLM's KV cache as caches of datadist: one per size of a layer's block, whatever its layout.

A block of a layer is a row of bytes. vLLM says where each of them lies (`KVCacheTensor`); cache groups
that share memory are registered once, since a block id belongs to one group at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheTensor, UniformTypeKVCacheSpecs

from datadist import Cache, CacheDesc, LLMDataDist


@dataclass(frozen=True, order=True)
class _Layer:
    """Where the blocks of a layer lie, in bytes from the begin of vLLM's allocation."""

    page: int
    offset: int
    stride: int
    blocks: int


class Region:
    """Layers whose blocks are equally large, as a cache of datadist."""

    def __init__(self, engine: LLMDataDist, memory: torch.Tensor, layers: list[_Layer]) -> None:
        self._engine = engine
        self._memory = memory
        self._layers = layers
        self.block_bytes = layers[0].page
        self._by_parts: dict[int, Cache] = {}
        self._lock = threading.Lock()

    @property
    def layers(self) -> int:
        """How many layers (groups that share memory count once)."""
        return len(self._layers)

    def cache(self, parts: int) -> Cache:
        """The cache in which blocks are ``parts`` tensors: the first part of each layer, then the next.

        Registered at the first use. Readers of other ranks need only their heads, which are a part.
        """
        with self._lock:
            if parts not in self._by_parts:
                self._by_parts[parts] = self._registered(parts)
            return self._by_parts[parts]

    def _registered(self, parts: int) -> Cache:
        tensors = [
            self._view(layer, part, parts) for part in range(parts) for layer in self._layers
        ]
        desc = CacheDesc.from_tensors(tensors, tensors_per_layer=1)
        return self._engine.cache_manager.register_blocks_cache(desc, tensors)

    def _view(self, layer: _Layer, part: int, parts: int) -> torch.Tensor:
        size = layer.page // parts
        return torch.as_strided(
            self._memory, (layer.blocks, size), (layer.stride, 1), layer.offset + part * size
        )


def regions_of(
    config: KVCacheConfig, tensors: Mapping[str, torch.Tensor], engine: LLMDataDist
) -> list[Region]:
    """Raise ``NotImplementedError`` for memory that is not one allocation, as vLLM 0.32 makes it."""
    memory = _memory_of(config, tensors)
    found: dict[int, set[_Layer]] = {}
    for tensor in config.kv_cache_tensors:
        page = _page_of(config, tensor)
        for place in range(len(tensor.layers)):
            layer = _Layer(
                page,
                tensor.offset + place * tensor.layer_stride,
                tensor.block_stride,
                config.num_blocks_of(tensor),
            )
            found.setdefault(page, set()).add(layer)
    return [Region(engine, memory, sorted(found[page])) for page in sorted(found)]


def _memory_of(config: KVCacheConfig, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """All of vLLM's allocation as bytes."""
    first = config.kv_cache_tensors[0]
    storage = tensors[first.layers[0]].untyped_storage()
    memory = torch.empty(0, dtype=torch.int8, device=storage.device).set_(storage)
    for tensor in config.kv_cache_tensors:
        for place, name in enumerate(tensor.layers):
            expected = storage.data_ptr() + tensor.offset + place * tensor.layer_stride
            if tensors[name].data_ptr() != expected:
                raise NotImplementedError(
                    f"the cache of layer {name!r} lies at {tensors[name].data_ptr():#x}, and not where "
                    f"vLLM's KVCacheConfig has it, {expected:#x}: DataDistConnector does not know this "
                    "way of allocating"
                )
    return memory


def _page_of(config: KVCacheConfig, tensor: KVCacheTensor) -> int:
    """The bytes of one block of one layer."""
    name = tensor.layers[0]
    spec = next(g.kv_cache_spec for g in config.kv_cache_groups if name in g.layer_names)
    if isinstance(spec, UniformTypeKVCacheSpecs):
        spec = spec.kv_cache_specs[name]
    return int(spec.page_size_bytes)

"""Checks of `transfer_cache_async` that are possible at the call, without the destination."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index as as_index
from typing import TypeAlias

import numpy as np

from datadist.api.cache import Cache, desc_at_creation
from datadist.api.tasks import TransferConfig, TransferWithCacheKeyConfig, check_uint64s
from datadist.base import checks
from datadist.status import param_invalid
from datadist.transfers.block_lists import Blocks, check_blocks, check_distinct
from datadist.transfers.resolve import slots_of
from datadist.transfers.transfer import as_param_invalid
from datadist.types import BlocksCacheKey

ADDRESS_END = 1 << 63

Config = TransferConfig | TransferWithCacheKeyConfig
Strides: TypeAlias = "Mapping[int, Mapping[int, int]]"
"""By cluster and address where blocks of a destination lie apart: bytes from one to the next."""
DENSE: Strides = {}


@dataclass(frozen=True)
class LayerBlocks:
    """Block indices as given; ``nbytes`` is 0 where the size of a remote block was not given."""

    source: Blocks | None
    target: Blocks | None
    nbytes: int


def take_blocks(source: Blocks | None, target: Blocks | None, nbytes: int | None) -> LayerBlocks:
    """Copies of the lists: the caller may use its own again while the task runs.

    Raises ``TypeError``, ``ValueError``, LLM_PARAM_INVALID.
    """
    target = _kept("dst_block_indices", target)
    source = _kept("src_block_indices", source)
    if nbytes is not None:
        checks.check_uint64("dst_block_memory_size", nbytes)
    if source is not None and target is None:
        raise param_invalid("src_block_indices needs dst_block_indices")
    if source is not None and target is not None and len(source) != len(target):
        raise param_invalid(
            f"src_block_indices has {len(source)} entries and dst_block_indices {len(target)}"
        )
    if source is None and target is not None and nbytes is None:
        raise param_invalid("dst_block_indices alone needs dst_block_memory_size, in bytes")
    return LayerBlocks(source, target, nbytes or 0)


def _kept(name: str, blocks: Blocks | None) -> Blocks | None:
    if blocks is None:
        return None
    checks.check_blocks(name, blocks)
    if not isinstance(blocks, np.ndarray):
        plain = [as_index(block) for block in blocks]
        check_uint64s(name, plain)
        return plain
    if blocks.size and blocks.min() < 0:
        check_uint64s(name, blocks.tolist())
    return blocks.copy()


def per_layer(cache: Cache) -> int:
    """Tensors of a layer of the source."""
    return desc_at_creation(cache).tensors_per_layer


def check_fit(
    cache: Cache, configs: Sequence[Config], blocks: LayerBlocks, strides: Strides = DENSE
) -> None:
    """Whether the source, the destinations and the lists fit together. Raises LLM_PARAM_INVALID."""
    if blocks.target is None and blocks.nbytes:
        raise param_invalid(f"dst_block_memory_size is {blocks.nbytes} without dst_block_indices")
    tensors = desc_at_creation(cache).num_tensors
    if tensors % per_layer(cache):
        raise param_invalid(
            f"{cache!r} has an odd number of tensors: a layer has 2"
            if per_layer(cache) == 2
            else f"{cache!r} has {tensors} tensors, not a multiple of the {per_layer(cache)} of a layer "
            "(CacheDesc.tensors_per_layer)"
        )
    for config in configs:
        _check_config(cache, config, blocks)
    _check_source_blocks(cache, blocks)
    _check_spread(cache, blocks)
    with as_param_invalid():
        check_distinct("dst_block_indices", () if blocks.target is None else blocks.target)
    for config in configs:
        _check_slot(cache, config)
        _check_destination(cache, config, blocks, strides)


def _check_config(cache: Cache, config: Config, blocks: LayerBlocks) -> None:
    layers = desc_at_creation(cache).num_tensors // per_layer(cache)
    if config.src_layer_range is None:
        config.src_layer_range = range(layers)
    if blocks.source is not None and config.src_batch_index != 0:
        raise param_invalid(
            f"src_batch_index is {config.src_batch_index}, it must be 0 with src_block_indices"
        )
    if config.src_layer_range.stop > layers:
        raise param_invalid(
            f"src_layer_range is {config.src_layer_range}: there are {layers} layers"
        )
    if isinstance(config, TransferConfig):
        expected = per_layer(cache) * len(config.src_layer_range)
        if len(config.dst_addrs) != expected:
            raise param_invalid(
                f"dst_addrs has {len(config.dst_addrs)} entries: {len(config.src_layer_range)} layers "
                f"need {expected}"
            )


def _check_source_blocks(cache: Cache, blocks: LayerBlocks) -> None:
    if blocks.source is None:
        return
    if not cache.is_blocks_cache:
        raise param_invalid(f"src_block_indices needs a blocks cache, not {cache!r}")
    block = _block_bytes(cache)
    if blocks.nbytes and blocks.nbytes != block:
        raise param_invalid(
            f"dst_block_memory_size is {blocks.nbytes}: blocks of {cache!r} hold {block} bytes"
        )
    with as_param_invalid():
        check_blocks("src_block_indices", blocks.source, desc_at_creation(cache).shape[0])


def _check_spread(cache: Cache, blocks: LayerBlocks) -> None:
    """A slot of a contiguous cache over blocks, each of which gets a part of it."""
    if blocks.target is None or blocks.source is not None:
        return
    if cache.is_blocks_cache:
        raise param_invalid(f"dst_block_indices needs src_block_indices with {cache!r}")
    size, slot = desc_at_creation(cache).size, _block_bytes(cache)
    if not 0 < blocks.nbytes < size:
        raise param_invalid(
            f"dst_block_memory_size is {blocks.nbytes}, it must be in [1, {size - 1}] for {cache!r}"
        )
    most = -(-slot // blocks.nbytes)
    if len(blocks.target) > most:
        raise param_invalid(
            f"dst_block_indices has {len(blocks.target)} entries: a slot of {cache!r} holds {slot} "
            f"bytes, which fill {most} blocks of {blocks.nbytes}"
        )


def _check_slot(cache: Cache, config: Config) -> None:
    slot, count = config.src_batch_index, desc_at_creation(cache).shape[0]
    if cache.is_blocks_cache and slot:
        raise param_invalid(f"src_batch_index is {slot}: it must be 0 with a blocks cache")
    if slot >= count:
        raise param_invalid(f"src_batch_index is {slot}: {slots_of(cache.cache_id, count)}")


def _check_destination(cache: Cache, config: Config, blocks: LayerBlocks, strides: Strides) -> None:
    if isinstance(config, TransferConfig):
        _check_addresses(cache, config, blocks, strides)
        return
    source, target = config.src_layer_range, config.dst_layer_range
    if len(source) != len(target):  # they can be set one after the other
        raise param_invalid(
            f"src_layer_range {source} and dst_layer_range {target} differ in length"
        )
    to_blocks = isinstance(config.cache_key, BlocksCacheKey)
    if to_blocks and blocks.target is None and not cache.is_blocks_cache:
        raise param_invalid(
            f"{config.cache_key!r} names a blocks cache and {cache!r} is contiguous: give "
            "dst_block_indices"
        )


def _check_addresses(
    cache: Cache, config: TransferConfig, blocks: LayerBlocks, strides: Strides
) -> None:
    """Written ranges must end below 2**63, as all addresses do."""
    last = desc_at_creation(cache).shape[0] - 1 if cache.is_blocks_cache else 0
    if blocks.target is not None and len(blocks.target):
        most = blocks.target.max() if isinstance(blocks.target, np.ndarray) else max(blocks.target)
        last = int(most)
    nbytes = bytes_of_block(cache, blocks)
    apart = strides.get(config.dst_cluster_id, {})
    for place, address in enumerate(config.dst_addrs):
        size = last * apart.get(address, nbytes) + nbytes
        if not 0 < address <= ADDRESS_END - size:
            raise param_invalid(
                f"dst_addrs[{place}] is {address:#x}: {size} bytes from there on are no memory"
            )


def bytes_of_block(cache: Cache, blocks: LayerBlocks) -> int:
    """Bytes of a block of the destinations, or of a slot."""
    spread = blocks.target is not None and blocks.source is None
    return blocks.nbytes if spread else _block_bytes(cache)


def _block_bytes(cache: Cache) -> int:
    desc = desc_at_creation(cache)
    return desc.size // desc.shape[0]

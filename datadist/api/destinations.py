"""Checks that one call of `transfer_cache_async` writes no byte twice, since the result would be
random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from datadist.api.arguments import cluster_of, name_of
from datadist.api.cache import Cache, desc_at_creation
from datadist.api.layerwise_checks import (
    DENSE,
    Config,
    LayerBlocks,
    Strides,
    bytes_of_block,
)
from datadist.api.tasks import TransferConfig
from datadist.keys import BlocksCacheKey, CacheKeyByIdAndIndex
from datadist.status import LLMException, param_invalid
from datadist.transfers.resolve import ById, Source

Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class WrittenRanges:
    """The parts of each tensor that are written: offsets and lengths in bytes."""

    offsets: Int64Array
    lengths: Int64Array

    @cached_property
    def end(self) -> int:
        """Bytes from the base to the end of the last part."""
        return int((self.offsets + self.lengths).max(initial=0))


@dataclass(frozen=True)
class BaseAddress:
    """An address of a config, its position in the arguments, and what is written from there on."""

    address: int
    config: int
    place: int
    written: WrittenRanges

    def __str__(self) -> str:
        return f"transfer_configs[{self.config}].dst_addrs[{self.place}]"


def check_no_overlap(
    cache: Cache, configs: Sequence[Config], blocks: LayerBlocks, strides: Strides = DENSE
) -> None:
    """Refuse destinations that overlap; each was checked by itself. Raises LLM_PARAM_INVALID."""
    _check_addresses(cache, configs, blocks, strides)
    _check_layers(cache, configs, blocks)


def _check_addresses(
    cache: Cache, configs: Sequence[Config], blocks: LayerBlocks, strides: Strides
) -> None:
    bases: dict[int, list[BaseAddress]] = {}
    nbytes = bytes_of_block(cache, blocks)
    written: dict[int, WrittenRanges] = {}
    for number, config in enumerate(configs):
        if not isinstance(config, TransferConfig):
            continue
        of_cluster = bases.setdefault(config.dst_cluster_id, [])
        apart = strides.get(config.dst_cluster_id, {})
        for place, each in enumerate(config.dst_addrs):
            stride = apart.get(each, nbytes)
            if stride not in written:
                written[stride] = _written(cache, blocks, stride)
            of_cluster.append(BaseAddress(each, number, place, written[stride]))
    for cluster, listed in bases.items():
        _check_sorted(cluster, sorted(listed, key=lambda base: base.address))


def _written(cache: Cache, blocks: LayerBlocks, stride: int) -> WrittenRanges:
    """Blocks of the destination begin ``stride`` bytes apart."""
    desc = desc_at_creation(cache)
    slot, block = desc.size // desc.shape[0], bytes_of_block(cache, blocks)
    if blocks.target is not None:
        numbers = np.array(blocks.target, np.int64)
    elif not cache.is_blocks_cache or stride == block:
        size = desc.size if cache.is_blocks_cache else slot
        return WrittenRanges(np.zeros(1, np.int64), np.array([size], np.int64))
    else:
        numbers = np.arange(desc.shape[0])
    lengths = np.full(len(numbers), block, np.int64)
    if blocks.source is None and blocks.target is not None:
        # the last of the blocks over which a slot is spread may get less
        lengths[-1:] = min(block, slot - (len(numbers) - 1) * block)
    return WrittenRanges(numbers * stride, lengths)


def _check_sorted(cluster: int, bases: list[BaseAddress]) -> None:
    """Compare parts only if bases are close together: most are a whole tensor apart."""
    first, end = 0, 0
    for place, base in enumerate(bases):
        if base.address >= end:
            _check_near(cluster, bases[first:place])
            first = place
        end = max(end, base.address + base.written.end)
    _check_near(cluster, bases[first:])


def _check_near(cluster: int, bases: list[BaseAddress]) -> None:
    found = _overlap(bases) if len(bases) > 1 else None
    if found is not None:
        raise _overlapping(cluster, *(bases[place] for place in found))


def _overlap(bases: list[BaseAddress]) -> tuple[int, int] | None:
    """Places of two bases of which parts overlap, if there are any.

    Where parts overlap at all, two that follow each other by their begin do.
    """
    begins = np.concatenate([base.address + base.written.offsets for base in bases])
    owner = np.repeat(np.arange(len(bases)), [len(base.written.offsets) for base in bases])
    order = np.argsort(begins, kind="stable")
    lengths = np.concatenate([base.written.lengths for base in bases])[order]
    bad = np.flatnonzero(np.diff(begins[order]) < lengths[:-1])
    if not bad.size:
        return None
    one, other = sorted(owner[order[bad[0] : bad[0] + 2]])
    return int(one), int(other)


def _overlapping(cluster: int, *bases: BaseAddress) -> LLMException:
    first, second = sorted(bases, key=lambda base: (base.config, base.place))
    if first.address == second.address:
        what = f"{second} is {second.address:#x}, and so is {first}"
    else:
        what = (
            f"{second} is {second.address:#x}, and what is written there overlaps that of {first}, "
            f"which is {first.address:#x}"
        )
    return param_invalid(f"{what}: give each tensor memory of its own at cluster {cluster}")


def _check_layers(cache: Cache, configs: Sequence[Config], blocks: LayerBlocks) -> None:
    to_blocks = cache.is_blocks_cache or blocks.target is not None
    seen: dict[tuple[int, Source], list[tuple[range, int]]] = {}
    for number, config in enumerate(configs):
        if isinstance(config, TransferConfig):
            continue
        target = cluster_of(config.cache_key), _target(config.cache_key, to_blocks)
        seen.setdefault(target, []).append((config.dst_layer_range, number))
    for listed in seen.values():
        listed.sort(key=lambda entry: entry[0].start)
        for (one, first), (other, second) in pairwise(listed):
            if other.start < one.stop:
                raise param_invalid(
                    f"transfer_configs[{second}] has dst_layer_range {other} and "
                    f"transfer_configs[{first}] {one} of the same destination: name each of its "
                    "layers once"
                )


def _target(key: BlocksCacheKey | CacheKeyByIdAndIndex, to_blocks: bool) -> Source:
    """What a key names; a cache of blocks is written by their numbers, whatever the slot."""
    if isinstance(key, CacheKeyByIdAndIndex):
        return ById(key.cache_id, 0 if to_blocks else key.batch_index)
    return name_of(key)

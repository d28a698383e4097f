"""Checks of the cache manager's arguments, and their conversion for the engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from datadist.api.cache import Cache, desc_at_creation
from datadist.base import checks
from datadist.base.hints import ADDRESSES
from datadist.caches.directory import KeyName
from datadist.caches.owned import Layout, describe
from datadist.control.messages import MAX_CUTS
from datadist.control.messages import MAX_TENSORS as MAX_REGIONS
from datadist.engine.engine import Engine
from datadist.status import param_invalid
from datadist.transfers.block_lists import Blocks
from datadist.transfers.resolve import ById, Layers, Source
from datadist.types import (
    INVALID_ID,
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    check_block_stride,
    element_size,
)

MAX_DIMS = 31


class _Unnamed(int):
    """A default number, told from the same number given by the caller."""


PER_LAYER = _Unnamed(2)
"""Tensors of a layer where the caller of a transfer names no number: then it is that of the caches."""
MAX_TENSORS = 1 << 16


def check_not_none(name: str, value: object) -> None:
    """Raise ``AttributeError`` for None, as upstream does."""
    if value is None:
        raise AttributeError(f"{name} is None: it must be given")


def check_kind(name: str, cache: Cache, blocks: bool, hint: str) -> None:
    """A cache, not None, of the kind that the method is for. Raises LLM_PARAM_INVALID."""
    check_not_none(name, cache)
    if cache.is_blocks_cache is not blocks:
        state = "is not" if blocks else "is"
        raise param_invalid(f"{name} {state} a blocks cache ({cache!r}): {hint}")


def check_count(desc: CacheDesc, addrs: list[Any]) -> None:
    """One address per tensor. Raises ``TypeError`` for None, LLM_PARAM_INVALID."""
    checks.check_isinstance("addrs", addrs, list, allow_none=False, use=ADDRESSES)
    if not addrs:
        raise param_invalid("addrs is empty: give one address per tensor")
    check_not_none("cache_desc", desc)
    if len(addrs) != desc.num_tensors:
        raise param_invalid(
            f"{desc.num_tensors} tensors need as many addrs, not {len(addrs)}: give one address per "
            "tensor"
        )


def check_addresses(addrs: list[int]) -> None:
    """Addresses of memory. Raises LLM_PARAM_INVALID."""
    for index, address in enumerate(addrs):
        if not 0 < address < 1 << 63:
            raise param_invalid(
                f"addrs[{index}] is {address:#x}, which is not a valid address: give that of memory "
                "of this process, such as array.ctypes.data or tensor.data_ptr()"
            )


def tensor_size(desc: CacheDesc) -> int:
    """Bytes of one tensor, from its first to its last one.

    Raises LLM_PARAM_INVALID for dimensions that make no tensor, and blocks that overlap.
    """
    shape = desc.shape
    if desc.num_tensors > MAX_TENSORS:
        raise param_invalid(
            f"num_tensors is {desc.num_tensors}, at most {MAX_TENSORS} are possible: make several caches"
        )
    if not 1 <= len(shape) <= MAX_DIMS:
        raise param_invalid(f"shape has {len(shape)} dimensions, expected 1 to {MAX_DIMS}")
    if min(shape) <= 0:
        raise param_invalid(f"shape is {list(shape)}: every dimension must be positive")
    size = math.prod(shape) * element_size(desc.data_type)
    if size >= 1 << 63:
        raise param_invalid(f"a tensor of shape {list(shape)} would hold {size} bytes, over int64")
    check_block_stride(desc)
    block = size // shape[0]
    size = (shape[0] - 1) * stride_of(desc) + block
    if size >= 1 << 63:
        raise param_invalid(
            f"{shape[0]} blocks that begin {desc.block_stride} bytes apart take {size} bytes, over int64"
        )
    return size


def check_pieces(layout: Layout, regions: Sequence[int]) -> None:
    """No more places where registered ranges meet than peers take. Raises LLM_PARAM_INVALID."""
    for count, most, what in (
        (
            len(layout.cuts),
            MAX_CUTS,
            "places inside of its blocks where ranges registered before end",
        ),
        (len(regions), MAX_REGIONS, "ranges registered before"),
    ):
        if count > most:
            raise param_invalid(
                f"the cache would have {count} {what}, at most {most} are possible: register the "
                "larger range first"
            )


def stride_of(desc: CacheDesc) -> int:
    """Bytes from one block or slot to the next."""
    dense = math.prod(desc.shape[1:]) * element_size(desc.data_type)
    return dense if desc.block_stride is None else desc.block_stride


def layout_of(desc: CacheDesc, addresses: Sequence[int], size: int, blocks: bool) -> Layout:
    """The layout of a new cache: addresses, count and stride; ``size`` as :func:`tensor_size`."""
    return Layout(
        blocks, tuple(addresses), stride_of(desc), desc.shape[0], size, desc.placement,
        desc.data_type.value, desc.tensors_per_layer,
    )  # fmt: skip


def name_of(key: CacheKey | BlocksCacheKey) -> KeyName:
    """What identifies the key on its owner. Raises ``TypeError`` as :func:`cluster_of`."""
    if isinstance(key, BlocksCacheKey):
        _check_fits("model_id", key.model_id)
        return KeyName("blocks", INVALID_ID, key.model_id)
    if key.prefix_id != INVALID_ID:
        return KeyName("prefix", key.prefix_id, key.model_id)
    return KeyName("request", key.req_id, key.model_id)


def cluster_of(key: CacheKey | CacheKeyByIdAndIndex | BlocksCacheKey) -> int:
    """The cluster that a key names.

    Raises ``TypeError`` unless it is a uint64: a blocks key takes any int, and is refused when it
    is used (LLM-DataDist API, keys).
    """
    _check_fits("cluster_id", key.cluster_id)
    return key.cluster_id


def _check_fits(name: str, value: int) -> None:
    checks.check_isinstance(name, value, int, allow_none=False)
    if not 0 <= value < 1 << 64:
        raise TypeError(f"{name} is {value}, only support an unsigned 64-bit integer")


def slot_names(keys: Sequence[CacheKey]) -> list[tuple[int, KeyName]]:
    """Slot and name of each key."""
    return [(slot, name_of(key)) for slot, key in enumerate(keys)]


def blocks_name(key: BlocksCacheKey | None) -> list[tuple[int, KeyName]]:
    """The key of a blocks cache, if any."""
    return [] if key is None else [(0, name_of(key))]


def without_placeholders(keys: list[tuple[int, KeyName]]) -> list[tuple[int, KeyName]]:
    """The keys without placeholders."""
    return [(slot, name) for slot, name in keys if not _is_placeholder(name)]


def _is_placeholder(name: KeyName) -> bool:
    return name.space == "request" and name.key == INVALID_ID


def check_key_count(keys: list[tuple[int, KeyName]], desc: CacheDesc) -> None:
    """No more keys than slots. Raises LLM_PARAM_INVALID."""
    if len(keys) > desc.shape[0]:
        raise param_invalid(
            f"{len(keys)} cache keys for {desc.shape[0]} batch slots (shape[0]): give at most one key "
            "per slot"
        )


def check_unique(engine: Engine, keys: list[tuple[int, KeyName]]) -> None:
    """Uniqueness of the keys of a new cache (LLM-DataDist API, keys and indexes).

    A placeholder, ``CacheKey(cluster, INVALID_ID)``, has the identity of a blocks key.
    """
    seen: dict[KeyName, int] = {}
    for slot, name in keys:
        if name in seen:
            hint = "give placeholders distinct model_ids" if _is_placeholder(name) else "drop one"
            raise param_invalid(
                f"identical keys {seen[name]} and {slot} ({describe(name)}): {hint}"
            )
        seen[name] = slot
        if _is_placeholder(name) and engine.owned.bound(KeyName("blocks", INVALID_ID, name.model)):
            raise param_invalid(
                f"placeholder key {slot} has model_id {name.model}, which a blocks cache of this "
                "engine is keyed with: use another model_id"
            )


def check_one_id(key: CacheKey) -> None:
    """Exactly one id in a pull. Raises LLM_PARAM_INVALID."""
    if (key.req_id != INVALID_ID) == (key.prefix_id != INVALID_ID):
        raise param_invalid(
            f"exactly one of req_id and prefix_id must be valid in a pull, got {key!r}: give "
            f"{INVALID_ID} (2**64 - 1) for the other one"
        )


def check_source_blocks(
    key: CacheKey | CacheKeyByIdAndIndex | BlocksCacheKey, src_blocks: Blocks
) -> None:
    """Source blocks exactly with a blocks key. Raises LLM_PARAM_INVALID."""
    if isinstance(key, BlocksCacheKey):
        if not len(src_blocks):
            raise param_invalid(
                "src_blocks is empty: with a BlocksCacheKey list the owner's blocks"
            )
        return
    if isinstance(key, CacheKey):
        check_one_id(key)
    if len(src_blocks):
        no_grant = ", and the key names no grant of a linked cluster" * isinstance(key, CacheKey)
        raise param_invalid(
            f"src_blocks must be empty with a {type(key).__name__}: a contiguous slot has no "
            f"blocks{no_grant}"
        )


def check_per_layer(value: int) -> None:
    """A positive uint32. Raises ``TypeError``, ``ValueError``, LLM_PARAM_INVALID."""
    checks.check_uint32("tensor_num_per_layer", value)
    if value <= 0:
        raise param_invalid("tensor_num_per_layer is 0: it must be positive")


def layers_of(cache: Cache, source: range | None, target: range | None, per_layer: int) -> Layers:
    """The layers of a pull into a cache.

    Raises ``TypeError``, ``ValueError``, LLM_PARAM_INVALID.
    """
    return Layers(
        _layer_range("src_layer_range", source),
        _layer_range("dst_layer_range", target),
        *per_layer_of(cache, per_layer),
    )


def per_layer_of(cache: Cache, given: int) -> tuple[int, bool]:
    """The tensors of a layer, and whether the caller named the number."""
    named = given is not PER_LAYER
    return (int(given) if named else desc_at_creation(cache).tensors_per_layer), named


def _layer_range(name: str, value: range | None) -> range | None:
    if value is None:
        return None
    checks.check_isinstance(name, value, range)
    if value.step != 1:
        raise param_invalid(f"{name} is {value}: its step must be 1")
    if value.start < 0:
        raise param_invalid(f"{name} is {value}: it must not start below 0")
    if len(value) == 0:
        return None
    checks.check_uint32(f"the last layer of {name}", value.stop - 1)
    return range(value.start, value.stop)


def source_of(key: CacheKey | CacheKeyByIdAndIndex | BlocksCacheKey) -> Source:
    """The source that a key names."""
    if isinstance(key, CacheKeyByIdAndIndex):
        return ById(key.cache_id, key.batch_index)
    return name_of(key)

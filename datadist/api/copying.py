"""The cache manager's part that copies inside the engine, and the remapping of memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datadist.api.arguments import check_kind, stride_of
from datadist.api.cache import Cache, desc_at_creation, is_of_other_engine, is_pooled, own_cache_id
from datadist.api.manager_mixin import ManagerMixin
from datadist.base import checks
from datadist.base.callers import pass_on
from datadist.base.calls import begin, entries
from datadist.base.keywords import named_keywords
from datadist.status import LLMException, LLMStatusCode, param_invalid
from datadist.transfers.block_lists import check_named_distinct
from datadist.transfers.copies import SwapSide
from datadist.transfers.transfer import as_param_invalid
from datadist.transport import Placement, Region, Unsupported
from datadist.transports.defects import text_of
from datadist.types import MemInfo, Memtype


@named_keywords
@entries
class Copying(ManagerMixin):
    """Synchronous local copies between all placements that the transport can access."""

    def copy_cache(
        self,
        dst: Cache,
        src: Cache,
        dst_batch_index: int = 0,
        src_batch_index: int = 0,
        offset: int = 0,
        size: int = -1,
        req_id: int | None = None,
    ) -> None:
        """Copy ``size`` bytes at ``offset`` of a slot of ``src`` to the same offset in ``dst``.

        Per tensor; ``size`` -1 means the rest of the source slot. Shapes need not match, nor do
        element types (a warning, or LLM_PARAM_INVALID with ``datadist.check_types``); the numbers of
        tensors must. ``req_id`` has no effect.

        Raises LLMException: LLM_PARAM_INVALID, LLM_KV_CACHE_NOT_EXIST, LLM_FAILED.
        """
        begin("copy_cache")
        checks.check_isinstance("dst", dst, Cache)
        checks.check_isinstance("src", src, Cache)
        checks.check_uint32("dst_batch_index", dst_batch_index)
        checks.check_uint32("src_batch_index", src_batch_index)
        checks.check_uint64("offset", offset)
        checks.check_int64("size", size)
        check_kind("src", src, False, "use copy_blocks or swap_blocks")
        check_kind("dst", dst, False, "use copy_blocks or swap_blocks")
        if size != -1 and size <= 0:
            raise param_invalid(f"size is {size}: it must be -1 (the rest of the slot) or positive")
        if req_id is not None:
            checks.check_uint64("req_id", req_id)
        self._engine().copies.copy_cache(
            own_cache_id(dst, self),
            own_cache_id(src, self),
            dst_batch_index,
            src_batch_index,
            offset,
            size,
        )

    def copy_blocks(
        self, cache: Cache, copy_block_info: Mapping[int, list[int] | NDArray[np.integer[Any]]]
    ) -> None:
        """Copy block ``a`` to each block of ``copy_block_info[a]``, in every tensor, in order.

        A pair may copy what an earlier one has written, but no block is written twice. Lists of
        blocks may be NumPy arrays of integers.

        Raises LLMException: LLM_PARAM_INVALID, LLM_KV_CACHE_NOT_EXIST, LLM_FAILED.
        """
        begin("copy_blocks")
        checks.check_isinstance("cache", cache, Cache)
        checks.check_isinstance("copy_block_info", copy_block_info, dict, allow_none=False)
        checks.check_dict("copy_block_info", copy_block_info, int, object)
        for source, targets in copy_block_info.items():
            checks.check_list_of_blocks(f"copy_block_info[{source}]", targets)
        check_kind("cache", cache, True, "use copy_cache")
        pairs = [(a, b) for a, targets in copy_block_info.items() for b in targets]
        with as_param_invalid():
            check_named_distinct([b for _, b in pairs], _names_of(copy_block_info))
        self._engine().copies.copy_blocks(own_cache_id(cache, self), pairs)

    def swap_blocks(self, src_cache: Cache, dst_cache: Cache, src_to_dst: dict[int, int]) -> None:
        """Copy block ``a`` of ``src_cache`` to block ``src_to_dst[a]`` of ``dst_cache``.

        One way, in spite of the name, and to each block once. One of the two has placement HOST and
        the other one DEVICE; either may come from :meth:`Cache.create_cpu_cache`. Element types as in
        :meth:`copy_cache`.

        Raises LLMException: LLM_PARAM_INVALID, LLM_FAILED.
        """
        begin("swap_blocks")
        checks.check_isinstance("src_cache", src_cache, Cache)
        checks.check_isinstance("dst_cache", dst_cache, Cache)
        check_kind("src_cache", src_cache, True, "use copy_cache")
        check_kind("dst_cache", dst_cache, True, "use copy_cache")
        checks.check_isinstance("src_to_dst", src_to_dst, dict, allow_none=False)
        checks.check_dict("src_to_dst", src_to_dst, int, int)
        block_bytes = _check_alike(src_cache, dst_cache)
        _check_in_range(src_cache, dst_cache, src_to_dst)
        with as_param_invalid():
            names = (f"src_to_dst[{block}]" for block in src_to_dst)
            check_named_distinct(list(src_to_dst.values()), names)
        placements = [desc_at_creation(cache).placement for cache in (src_cache, dst_cache)]
        if set(placements) != set(Placement):
            raise param_invalid(
                f"swap_blocks copies between HOST and DEVICE, got {placements[0]} and {placements[1]}"
            )
        engine = self._engine()
        for cache in (src_cache, dst_cache):
            if not cache.tensor_addrs or is_of_other_engine(cache, self):
                raise param_invalid(f"{cache!r} has no tensors any more")
        owned = {c.cache_id for c in (src_cache, dst_cache) if engine.owned.get(c.cache_id)}
        for cache in (src_cache, dst_cache):
            if is_pooled(cache) and cache.cache_id not in owned:  # by unregister_cache
                raise param_invalid(f"{cache!r} was freed: its memory may be another cache's")
        source, target = (
            SwapSide(
                cache.cache_id,
                desc_at_creation(cache).data_type.value,
                cache.tensor_addrs,
                stride_of(desc_at_creation(cache)),
            )
            for cache in (src_cache, dst_cache)
        )
        engine.copies.swap_blocks(source, target, block_bytes, src_to_dst, sorted(owned))

    def remap_registered_memory(self, mem_infos: MemInfo | list[MemInfo]) -> None:
        """Have the transport make registered DEVICE memory reachable again after a device fault.

        Raises LLMException: LLM_PARAM_INVALID, LLM_NOT_YET_LINK without any link,
        LLM_FEATURE_NOT_ENABLED where the transport cannot do it, LLM_FAILED.
        """
        begin("remap_registered_memory")
        infos = [mem_infos] if isinstance(mem_infos, MemInfo) else mem_infos
        if not isinstance(infos, list) or not all(isinstance(i, MemInfo) for i in infos):
            raise param_invalid(f"mem_infos is {mem_infos!r}, only support MemInfo or a list of it")
        regions = [_region_of(info) for info in infos]
        if not regions:
            raise param_invalid("mem_infos is empty: list the memory to remap")
        engine = self._engine()
        if not engine.linked():
            raise LLMException(
                "remap_registered_memory needs a link: nothing is linked",
                status_code=LLMStatusCode.LLM_NOT_YET_LINK,
            )
        try:
            engine.transport.remap(regions)
        except Unsupported as error:
            pass_on(error)
            raise LLMException(
                f"backend {engine.backend.name}: {error}",
                status_code=LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
            ) from error
        except Exception as error:
            raise LLMException(
                f"remapping failed: {text_of(error, engine.transport)}",
                status_code=LLMStatusCode.LLM_FAILED,
            ) from error


def _check_alike(src: Cache, dst: Cache) -> int:
    """Equal block sizes and numbers of tensors; returns the bytes of a block."""
    descs = [desc_at_creation(cache) for cache in (src, dst)]
    blocks = [desc.size // desc.shape[0] for desc in descs]
    if blocks[0] != blocks[1]:
        raise param_invalid(
            f"a block of {src!r} holds {blocks[0]} bytes and one of {dst!r} {blocks[1]}: they must "
            "be equal"
        )
    if descs[0].num_tensors != descs[1].num_tensors:
        raise param_invalid(
            f"{src!r} and {dst!r} differ in their number of tensors, {descs[0].num_tensors} and "
            f"{descs[1].num_tensors}: they must be equal"
        )
    return blocks[0]


def _check_in_range(src: Cache, dst: Cache, pairs: dict[int, int]) -> None:
    for cache, blocks in ((src, pairs.keys()), (dst, pairs.values())):
        count = desc_at_creation(cache).shape[0]
        for block in blocks:
            if not 0 <= block < count:
                raise param_invalid(f"src_to_dst names block {block}: {cache!r} has {count} blocks")


def _names_of(info: Mapping[int, list[int] | NDArray[np.integer[Any]]]) -> Iterator[str]:
    for source, targets in info.items():
        for place in range(len(targets)):
            yield f"copy_block_info[{source}][{place}]"


def _region_of(info: MemInfo) -> Region:
    if info.mem_type is not Memtype.MEM_TYPE_DEVICE:
        raise param_invalid(f"{info!r}: only support MEM_TYPE_DEVICE")
    if not info.addr or not info.size or info.size <= 0:
        raise param_invalid(f"{info!r}: addr must not be 0 and size must be positive")
    return Region(info.addr, info.size, Placement.DEVICE)

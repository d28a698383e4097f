"""Copies inside one engine: between slots, between blocks, between host and device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from datadist.caches.element_types import ElementTypes
from datadist.caches.owned import Layout, OwnCache, OwnDirectory
from datadist.status import LLMException, LLMStatusCode, param_invalid
from datadist.transfers.plan import Bases, Vector, plan_blocks, plan_slots
from datadist.transfers.resolve import slots_of
from datadist.transport import Transport
from datadist.transports.defects import text_of


class SwapSide(NamedTuple):
    """A cache of `swap_blocks`, which need not be of this engine."""

    cache_id: int
    data_type: int
    """Number of a :class:`~datadist.types.DataType`."""
    bases: Bases
    stride: int
    """Bytes from one block to the next."""


class Copies:
    """Local copies through the transport, which can access each placement. Thread-safe."""

    def __init__(self, transport: Transport, owned: OwnDirectory, types: ElementTypes) -> None:
        self._transport = transport
        self._owned = owned
        self._types = types

    def copy_cache(
        self, dst_id: int, src_id: int, dst_slot: int, src_slot: int, offset: int, size: int
    ) -> None:
        """Copy ``size`` bytes (-1: what is left of the source slot) at ``offset`` of both slots.

        Raises LLMException with the status codes of ``CacheManager.copy_cache``.
        """

        def copy(caches: list[OwnCache]) -> None:
            source, target = (cache.layout for cache in caches)
            if len(source.bases) != len(target.bases):
                raise param_invalid(
                    f"cache {src_id} has {len(source.bases)} tensors and cache {dst_id} "
                    f"{len(target.bases)}: they must be equal"
                )
            _check_slot("src_batch_index", src_slot, src_id, source)
            _check_slot("dst_batch_index", dst_slot, dst_id, target)
            nbytes = _bytes_to_copy(
                {src_id: source, dst_id: target}, source.block_bytes, offset, size
            )
            segments = plan_slots(
                target.bases,
                source.bases,
                dst_slot * target.stride + offset,
                src_slot * source.stride + offset,
                nbytes,
            )
            self._types.check_copy(
                "copy_cache", (src_id, source.data_type), (dst_id, target.data_type)
            )
            self._copy(segments.local, segments.remote, segments.length)

        self._owned.using_all((src_id, dst_id), copy)

    def copy_blocks(self, cache_id: int, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy block ``a`` to block ``b`` for every pair in order, in every tensor.

        Raises LLM_KV_CACHE_NOT_EXIST, LLM_PARAM_INVALID for an index out of range.
        """

        def copy(cache: OwnCache) -> None:
            layout = cache.layout
            for source, target in pairs:
                for block in (source, target):
                    if not 0 <= block < layout.count:
                        raise param_invalid(
                            f"copy_block_info names block {block}: cache {cache_id} has "
                            f"{layout.count} blocks"
                        )
            if pairs:
                # Not merged: a pair may copy what an earlier one has written.
                stride = layout.stride
                index = np.array(pairs, np.int64)
                self._copy(
                    _addresses(layout.bases, index[:, 1] * stride),
                    _addresses(layout.bases, index[:, 0] * stride),
                    np.full(len(layout.bases) * len(pairs), layout.block_bytes, np.int64),
                )

        self._owned.using(cache_id, copy)

    def swap_blocks(
        self, source: SwapSide, target: SwapSide, block_bytes: int, src_to_dst: Mapping[int, int],
        cache_ids: Sequence[int],
    ) -> None:  # fmt: skip
        """Copy blocks of ``block_bytes`` between the tensors of two caches.

        ``cache_ids`` are caches of this engine among the two, kept alive meanwhile.
        """
        if not src_to_dst:
            return

        def copy(_: list[OwnCache]) -> None:
            segments = plan_blocks(
                target.bases,
                source.bases,
                list(src_to_dst.values()),
                list(src_to_dst),
                target.stride,
                source.stride,
                block_bytes,
            )
            self._types.check_copy("swap_blocks", source[:2], target[:2])
            self._copy(segments.local, segments.remote, segments.length)

        self._owned.using_all(cache_ids, copy)

    def _copy(self, dst: Vector, src: Vector, length: Vector) -> None:
        try:
            self._transport.copy(dst, src, length)
        except Exception as error:
            raise LLMException(
                f"the local copy failed: {text_of(error, self._transport)}",
                status_code=LLMStatusCode.LLM_FAILED,
            ) from error


def _check_slot(name: str, slot: int, cache_id: int, layout: Layout) -> None:
    if slot >= layout.count:
        raise param_invalid(f"{name} is {slot}: {slots_of(cache_id, layout.count)}")


def _bytes_to_copy(layouts: dict[int, Layout], slot: int, offset: int, size: int) -> int:
    """``size`` bytes, or -1 for the rest of ``slot`` bytes, which must fit a slot of both caches."""
    for cache_id, layout in layouts.items():
        if offset >= layout.block_bytes:
            raise param_invalid(
                f"offset is {offset}: a slot of cache {cache_id} holds {layout.block_bytes} bytes"
            )
    nbytes = slot - offset if size == -1 else size
    for cache_id, layout in layouts.items():
        if nbytes > layout.block_bytes - offset:
            raise param_invalid(
                f"{nbytes} bytes at offset {offset} do not fit a slot of cache {cache_id}, "
                f"which holds {layout.block_bytes}"
            )
    return nbytes


def _addresses(bases: Sequence[int], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.add.outer(np.array(bases, np.int64), offsets).ravel()

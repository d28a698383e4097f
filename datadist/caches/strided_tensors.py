"""Finds the blocks of tensors whose blocks lie further apart than they are long.

Such tensors lie between each other's blocks, so that their ranges overlap. What tells them apart is
their phase: the address of a block modulo the stride.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["StridedTensors", "farthest"]

Int64Array: TypeAlias = NDArray[np.int64]


class StridedTensors:
    """Tensors of one ``stride`` and one length of blocks; ``size`` is from the base to the last end."""

    def __init__(
        self,
        stride: int,
        block_bytes: int,
        base: Int64Array,
        size: Int64Array,
        cache_id: Int64Array,
    ) -> None:
        self._stride, self._block_bytes = stride, block_bytes
        order = np.lexsort((base, base % stride))
        self._base, self._cache_id = base[order], cache_id[order]
        self._end = self._base + size[order]
        self._phases, firsts = np.unique(self._base % stride, return_index=True)
        self._slices = [*firsts.tolist(), len(order)]
        """Tensors of the n-th phase are those from the n-th to the next place, by address."""

    def find(self, addresses: Int64Array, lengths: Int64Array) -> Int64Array:
        """The cache of the block that holds each range; -1 where none does."""
        found = np.full(len(addresses), -1, np.int64)
        left = np.flatnonzero((lengths > 0) & (lengths <= self._block_bytes))
        number = np.searchsorted(self._phases, addresses[left] % self._stride, side="right") - 1
        for _ in range(len(self._phases)):
            number[number < 0] += len(self._phases)
            # of the blocks that may begin before a range the nearest ones come first
            nearest = self._phases[number]
            offset = (addresses[left] - nearest) % self._stride
            near = offset < self._block_bytes
            left, number, offset = left[near], number[near], offset[near]
            if not left.size:
                break
            fits = offset + lengths[left] <= self._block_bytes
            self._take(found, left[fits], number[fits], addresses, lengths)
            missing = found[left] < 0
            left, number = left[missing], number[missing] - 1
        return found

    def _take(
        self, found: Int64Array, places: Int64Array, numbers: Int64Array,
        addresses: Int64Array, lengths: Int64Array,
    ) -> None:  # fmt: skip
        """Note the caches of ranges that lie in blocks of a phase, if there is one at that address."""
        for number in np.unique(numbers).tolist():
            own = places[numbers == number]
            first, last = self._slices[number], self._slices[number + 1]
            ends = self._end[first:last]
            # of tensors of one phase that begin before an address the farthest counts
            before = np.searchsorted(self._base[first:last], addresses[own], side="right") - 1
            place = farthest(ends)[before]
            good = (before >= 0) & (addresses[own] <= ends[place] - lengths[own])
            found[own[good]] = self._cache_id[first:last][place[good]]


def farthest(ends: Int64Array) -> Int64Array:
    """For each place that of the greatest end up to there."""
    places = np.arange(len(ends))
    return np.maximum.accumulate(np.where(ends == np.maximum.accumulate(ends), places, 0))

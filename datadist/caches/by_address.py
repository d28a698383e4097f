"""Which caches hold given addresses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from datadist.caches.own_cache import Layout, OwnCache
from datadist.caches.strided_tensors import StridedTensors, farthest
from datadist.status import param_invalid

__all__ = ["TensorsByAddress", "cuts"]

Int64Array: TypeAlias = NDArray[np.int64]
_Tensors: TypeAlias = "tuple[Int64Array, Int64Array, Int64Array]"


class TensorsByAddress:
    """Finds the caches of ranges; sorts their tensors once for all that is asked between two changes."""

    def __init__(self) -> None:
        self._sorted: tuple[tuple[int, bool, int | None], _Sorted] | None = None

    def find(
        self,
        addresses: NDArray[np.int64],
        lengths: NDArray[np.int64],
        caches: Iterable[OwnCache],
        changes: int,
        freed_too: bool,
        data_type: int | None,
    ) -> set[int]:
        """Ids of those of ``caches`` that hold these ranges, each range within one tensor.

        Where blocks lie apart, each range lies within one block. ``changes`` is another number
        whenever ``caches`` are others.

        Raises LLM_PARAM_INVALID for the first range that no tensor holds.
        """
        found = self._all(caches, changes, freed_too, data_type).find(addresses, lengths)
        if found.min(initial=0) < 0:
            bad = int(np.flatnonzero(found < 0)[0])
            raise param_invalid(
                f"the {int(lengths[bad])} bytes at {int(addresses[bad]):#x} are not inside one tensor "
                "(one block, where blocks lie apart) of a live cache of this engine"
            )
        return {int(cache_id) for cache_id in np.unique(found)}

    def _all(
        self, caches: Iterable[OwnCache], changes: int, freed_too: bool, data_type: int | None
    ) -> _Sorted:
        which = changes, freed_too, data_type
        known = self._sorted
        if known is not None and known[0] == which:
            return known[1]
        chosen = list(caches)
        if not freed_too:
            chosen = [cache for cache in chosen if cache.held]
        if data_type is not None:
            chosen = [cache for cache in chosen if cache.layout.data_type == data_type]
        tensors = _Sorted({cache.cache_id: cache.layout for cache in chosen})
        self._sorted = which, tensors
        return tensors


class _Sorted:
    """The tensors of layouts, by address."""

    def __init__(self, layouts: dict[int, Layout]) -> None:
        dense = {i: layout for i, layout in layouts.items() if layout.dense}
        base, size, cache_id = _tensors(dense)
        order = np.lexsort((cache_id, size, base))
        self._base, self._cache_id = base[order], cache_id[order]
        self._end = self._base + size[order]
        self._farthest = farthest(self._end)
        apart: dict[tuple[int, int], dict[int, Layout]] = {}
        for number, layout in layouts.items():
            if not layout.dense:
                apart.setdefault((layout.stride, layout.block_bytes), {})[number] = layout
        self._strided = [StridedTensors(*kind, *_tensors(alike)) for kind, alike in apart.items()]

    def find(self, addresses: Int64Array, lengths: Int64Array) -> Int64Array:
        """A cache for each range, the tensor of which holds it; -1 where none does."""
        found = self._find_dense(addresses, lengths)
        for tensors in self._strided:
            missing = np.flatnonzero(found < 0)
            if not missing.size:
                break
            found[missing] = tensors.find(addresses[missing], lengths[missing])
        return found

    def _find_dense(self, addresses: Int64Array, lengths: Int64Array) -> Int64Array:
        if not len(self._base):
            return np.full(len(addresses), -1, np.int64)
        # ranges may contain others, so of those that begin before an address the farthest counts
        before = np.searchsorted(self._base, addresses, side="right") - 1
        place = self._farthest[before]
        good = (before >= 0) & (lengths > 0) & (addresses <= self._end[place] - lengths)
        return np.where(good, self._cache_id[place], -1)


def _tensors(layouts: dict[int, Layout]) -> _Tensors:
    """Address, bytes and cache id of every tensor."""
    counts = [len(layout.bases) for layout in layouts.values()]
    base = np.fromiter(chain.from_iterable(each.bases for each in layouts.values()), np.int64)
    size = np.repeat(np.array([each.tensor_size for each in layouts.values()], np.int64), counts)
    return base, size, np.repeat(np.array(list(layouts), np.int64), counts)


def cuts(layout: Layout, begins: Sequence[int]) -> tuple[int, ...]:
    """Those of some addresses at which a segment of a transfer may cross, ascending.

    They lie inside of a block, or of a tensor where blocks lie side by side.
    """
    places = np.unique(np.array(begins, np.int64))
    # inside are those of which the bytes on both sides are
    found = _Sorted({1: layout}).find(places - 1, np.full(len(places), 2, np.int64))
    return tuple(places[found > 0].tolist())

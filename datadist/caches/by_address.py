"""Which caches hold given addresses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from datadist.caches.own_cache import OwnCache
from datadist.status import param_invalid

__all__ = ["TensorsByAddress"]

_Tensors: TypeAlias = "tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]"


class TensorsByAddress:
    """Finds the caches of ranges; sorts their tensors once for all that is asked between two changes."""

    def __init__(self) -> None:
        self._sorted: tuple[tuple[int, bool, int | None], _Tensors] | None = None

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

        ``changes`` is another number whenever ``caches`` are others.

        Raises LLM_PARAM_INVALID for the first range that no tensor holds.
        """
        base, size, cache_ids = self._all(caches, changes, freed_too, data_type)
        end = base + size
        # ranges may contain others, so of those that begin before an address the farthest counts
        place = np.arange(len(end))
        farthest = np.maximum.accumulate(np.where(end == np.maximum.accumulate(end), place, 0))
        before = np.searchsorted(base, addresses, side="right") - 1
        place = farthest[before]
        good = (before >= 0) & (lengths > 0) & (addresses - base[place] <= size[place] - lengths)
        if not good.all():
            bad = int(np.flatnonzero(~good)[0])
            raise param_invalid(
                f"the {int(lengths[bad])} bytes at {int(addresses[bad]):#x} are not inside one tensor "
                "of a live cache of this engine"
            )
        return {int(cache_id) for cache_id in np.unique(cache_ids[place])}

    def _all(
        self, caches: Iterable[OwnCache], changes: int, freed_too: bool, data_type: int | None
    ) -> _Tensors:
        which = changes, freed_too, data_type
        known = self._sorted
        if known is not None and known[0] == which:
            return known[1]
        chosen = list(caches)
        if not freed_too:
            chosen = [cache for cache in chosen if cache.held]
        if data_type is not None:
            chosen = [cache for cache in chosen if cache.layout.data_type == data_type]
        tensors = _tensors(chosen)
        self._sorted = which, tensors
        return tensors


def _tensors(caches: Sequence[OwnCache]) -> _Tensors:
    """Address, bytes and cache id of every tensor, by address; never empty."""
    layouts = [cache.layout for cache in caches]
    counts = [len(layout.bases) for layout in layouts]
    base = np.fromiter(chain.from_iterable(layout.bases for layout in layouts), np.int64)
    size = np.repeat(np.array([layout.tensor_size for layout in layouts], np.int64), counts)
    cache_ids = np.repeat(np.array([cache.cache_id for cache in caches], np.int64), counts)
    order = np.lexsort((cache_ids, size, base))
    if not len(order):
        return np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64)
    return base[order], size[order], cache_ids[order]

"""Cuts segments where regions of the transport meet, since no segment may lie in two of them.

Regions meet inside of a cache only where ranges that were registered overlap in part (see
:mod:`datadist.caches.memory`); all other caches have no cuts, and cost nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from datadist.status import param_invalid
from datadist.transfers.plan import Segments

__all__ = ["cut"]

Int64Array: TypeAlias = NDArray[np.int64]

MAX_MORE = 1 << 20
"""Segments that cuts may add to one transfer; the cuts of the remote end are its peer's."""


def cut(segments: Segments, local: Sequence[int], remote: Sequence[int]) -> Segments:
    """The same bytes, in segments that cross none of these addresses; both lists ascend.

    Raises LLM_PARAM_INVALID where there would be far more segments.
    """
    if not local and not remote:
        return segments
    mine, theirs, length = (
        np.asarray(v, np.int64) for v in (segments.local, segments.remote, segments.length)
    )
    mine, theirs, length = _cut(mine, theirs, length, local)
    theirs, mine, length = _cut(theirs, mine, length, remote)
    return Segments(mine, theirs, length, segments.nbytes)


def _cut(
    address: Int64Array, other: Int64Array, length: Int64Array, places: Sequence[int]
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Cut where ``address`` crosses ``places``; ``other`` goes along."""
    cuts = np.array(places, np.int64)
    first = np.searchsorted(cuts, address, side="right")
    inside = np.searchsorted(cuts, address + length, side="left") - first
    more = int(inside.sum())
    if not more:
        return address, other, length
    if more > MAX_MORE:
        raise param_invalid(
            f"{more} places where registered ranges meet lie in what is to be moved, more than "
            f"{MAX_MORE}: register the larger range first, or move fewer blocks"
        )
    segment = np.repeat(np.arange(len(address)), inside + 1)
    begins = np.cumsum(inside + 1) - inside - 1
    piece = np.arange(len(segment)) - begins[segment]
    offset = np.zeros(len(segment), np.int64)
    later = piece > 0
    offset[later] = cuts[(first[segment] + piece - 1)[later]] - address[segment][later]
    ends = np.append(offset[1:], 0)
    last = piece == inside[segment]
    ends[last] = length
    return address[segment] + offset, other[segment] + offset, ends - offset

"""Pulls between blocks caches that went well before: what was found out then, while it holds.

A decoder pulls a few blocks from the same cache over and over. Looking up link, key and bounds costs
more time than moving a block, so the outcome of a full pull is kept and used again for as long as
the peer's directory, the link and our cache are what they were. Whatever is out of the ordinary
takes the full way, which knows how to say what is wrong.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from datadist.checks import all_ints
from datadist.control.messages import Entry
from datadist.engine.owned import OwnCache
from datadist.engine.plan import SCALAR_SEGMENTS, Blocks, Segments, check_blocks, plan_blocks
from datadist.engine.resolve import Route

MOST = 256


@dataclass(frozen=True, eq=False)
class Way:
    """Where a blocks key of a cluster leads to, seen from one of our caches."""

    route: Route
    version: int
    """Of the peer's directory."""
    local_bases: Sequence[int]
    local_count: int
    remote_bases: Sequence[int]
    entry: Entry
    """The owner's cache."""
    stride: int
    lengths: Sequence[array[int]]
    """Vectors of ``stride``, by their number."""

    def plan(self, src_blocks: Blocks, dst_blocks: Blocks) -> Segments | None:
        """The segments; None for lists that are not in order."""
        if type(src_blocks) is not list or type(dst_blocks) is not list:
            return self._plan_many(src_blocks, dst_blocks)
        count = len(dst_blocks)
        if count != len(src_blocks) or not count:
            return None
        segments = count * len(self.local_bases)
        if segments > SCALAR_SEGMENTS:
            return self._plan_many(src_blocks, dst_blocks)
        length, stride = self.lengths[segments], self.stride
        local, remote = length[:], length[:]  # in half the time of making new ones
        place, bases, limit = 0, self.local_bases, self.local_count
        for block in dst_blocks:
            if type(block) is not int or not 0 <= block < limit:
                return None
            for base in bases:
                local[place] = base + block * stride
                place += 1
        place, bases, limit = 0, self.remote_bases, self.entry.count
        for block in src_blocks:
            if type(block) is not int or not 0 <= block < limit:
                return None
            for base in bases:
                remote[place] = base + block * stride
                place += 1
        return Segments(local, remote, length, stride * segments)

    def _plan_many(self, src_blocks: Blocks, dst_blocks: Blocks) -> Segments | None:
        for blocks in (src_blocks, dst_blocks):
            if isinstance(blocks, (list, tuple)):
                if not blocks or not all_ints(blocks):
                    return None
            elif not isinstance(blocks, np.ndarray) or not blocks.size:
                return None
        try:
            sources = check_blocks("src_blocks", src_blocks, self.entry.count)
            targets = check_blocks("dst_blocks", dst_blocks, self.local_count)
            stride = self.stride
            return plan_blocks(
                self.local_bases, self.remote_bases, targets, sources, stride, stride, stride
            )
        except (TypeError, ValueError):
            return None


class Shortcuts:
    """Ways by (cluster, model id of the blocks key, id of our cache)."""

    def __init__(self) -> None:
        self._ways: dict[tuple[int, int, int], Way] = {}

    def find(self, cluster: int, model: int, cache_id: int) -> Way | None:
        """A way that still holds, or None."""
        way = self._ways.get((cluster, model, cache_id))
        if way is None:
            return None
        route = way.route
        attempt, view = route.attempt, route.view
        if (
            view.version == way.version  # the peer has told us nothing since
            and not attempt.dead
            and route.rank not in attempt.gone
            and view.session.settled()
        ):
            return way
        self._ways.pop((cluster, model, cache_id), None)
        return None

    def remember(
        self, cluster: int, model: int, cache: OwnCache, entry: Entry, route: Route, version: int
    ) -> None:
        """Keep what a full pull of all layers found; ``version`` is that of the look-up."""
        if len(self._ways) >= MOST:
            self._ways.clear()
        layout = cache.layout
        self._ways[cluster, model, cache.cache_id] = Way(
            route, version, layout.bases, layout.count, tuple(entry.bases), entry,
            layout.stride, [array("q", (layout.stride,) * n) for n in range(SCALAR_SEGMENTS + 1)],
        )  # fmt: skip

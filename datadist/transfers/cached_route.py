"""A resolved route of repeated pulls or pushes, and the segments of a transfer over it."""

from __future__ import annotations

import logging
from array import array
from typing import TypeAlias

import numpy as np

from datadist.base.callers import pass_on
from datadist.base.known_way import KnownCall, KnownWay
from datadist.caches.owned import OwnCache, OwnDirectory
from datadist.control.messages import Entry
from datadist.transfers.block_lists import Blocks, check_blocks, check_distinct
from datadist.transfers.plan import SCALAR_SEGMENTS, Segments, plan_blocks, plan_lists
from datadist.transfers.resolve import Route
from datadist.transfers.transfer import Transfers

__all__ = ["SMALL_BYTES", "CachedRoute", "SmallPlan"]

log = logging.getLogger("datadist.transfer")

SMALL_BYTES = 256 << 10
"""Largest transfer of the small path in bytes; it takes microseconds, so that repeating it is cheap."""
SmallPlan: TypeAlias = "tuple[array[int], array[int], array[int]]"
"""Local addresses, remote addresses, bytes."""


class CachedRoute:
    """A resolved route between a blocks key of a cluster and one of our caches.

    What every small transfer reads is an attribute of its own: a property or a chain of objects costs
    as much as a part of the copy. ``owned`` is where ``cache`` is, and ``version`` that of the peer's
    directory. ``layers`` is None for pulls, and the layers of our cache for pushes.
    """

    def __init__(
        self, cache: OwnCache, owned: OwnDirectory, entry: Entry, route: Route, version: int,
        transfers: Transfers, layers: int | None = None,
    ) -> None:  # fmt: skip
        layout, push = cache.layout, layers is not None
        self.cache = cache
        self.entry = entry
        """The owner's cache."""
        self.route = route
        self.version = version
        """Of the peer's directory."""
        self.view = route.view
        self.session = route.view.session
        self.attempt = route.attempt
        self.rank = route.rank
        self.permits = route.attempt.permits[route.rank]
        self.line, self.take_permit = self.permits.line, self.permits.take_now
        self.release_permit = self.permits.release
        self.gone = route.attempt.gone
        self.tensors = len(layout.bases)
        self.tallies = transfers.tallies(route, push)
        self.seconds = transfers.timeout * (layers or 1)
        """How long a transfer may take unless the caller says so."""
        self.moves_small = transfers.verify is None if push else transfers.watches_control(route)
        """Whether small transfers take the short way: pulls do where reads of the transport report
        messages that arrived meanwhile."""
        self.local_bases, self.local_count = layout.bases, layout.count
        self.remote_bases, self.remote_count = tuple(entry.bases), entry.count
        self.local_base, self.remote_base = self.local_bases[0], self.remote_bases[0]
        self.local_stride, self.remote_stride = layout.stride, entry.stride
        self.block_bytes = block_bytes = layout.block_bytes
        self.small = min(SCALAR_SEGMENTS, SMALL_BYTES // block_bytes)
        self.lengths = [array("q", (block_bytes,)) * n for n in range(self.small + 1)]
        """Vectors of ``block_bytes``, by their number."""
        self.known_bytes = block_bytes * self.tensors
        """Of a block in all tensors."""
        self.known = self._known_way(owned, push) if self.moves_small else None
        """The transport's own call for few blocks, if it has one (:meth:`Link.known_way`)."""

    def _known_way(self, owned: OwnDirectory, write: bool) -> KnownCall | None:
        """What :meth:`RouteCache._move_small` looks at and pins, looked at in one step."""
        cache, attempt, session = self.cache, self.attempt, self.session
        link = attempt.link
        if link is None:
            return None
        way = KnownWay(
            self.rank, write, self.block_bytes,
            self.local_bases, self.local_stride, self.local_count,
            self.remote_bases, self.remote_stride, self.remote_count,
            (
                (self.view, "version", self.version), (session, "dispatching", False),
                (session, "closed", False), (cache, "held", True), (attempt, "dead", False),
                (attempt, "link", link),
            ),
            ((owned.caches, cache.cache_id, True), (self.gone, self.rank, False)),
        )  # fmt: skip
        try:
            return link.known_way(way)
        except Exception as error:  # the transfer that found the route has gone well
            pass_on(error)
            log.exception("defect of the transport: known_way raised; please report it")
            return None

    def is_current(self) -> bool:
        """Whether the peer is still linked and its directory has not changed."""
        return (
            self.view.version == self.version
            and not self.session.closed
            and self.rank not in self.gone
        )

    def small_plan(
        self, their_blocks: list[int], our_blocks: list[int], write: bool = False
    ) -> SmallPlan | None:
        """Up to ``small`` segments; None for more, and for lists that are not in order."""
        most = self.small + 1
        # Copies: another thread may change the caller's lists meanwhile.
        our_blocks, their_blocks = our_blocks[:most], their_blocks[:most]
        count = len(our_blocks)
        segments = count * self.tensors
        if count != len(their_blocks) or not 0 < segments <= self.small:
            return None
        length = self.lengths[segments]
        local, remote = length[:], length[:]  # in half the time of making new ones
        if segments == 1:  # a third of the time of the loops
            (mine,), (theirs,) = our_blocks, their_blocks
            if type(mine) is not int or type(theirs) is not int:
                return None
            if not (0 <= mine < self.local_count and 0 <= theirs < self.remote_count):
                return None
            local[0] = self.local_base + mine * self.local_stride
            remote[0] = self.remote_base + theirs * self.remote_stride
            return local, remote, length
        place, bases, limit = 0, self.local_bases, self.local_count
        stride = self.local_stride
        for block in our_blocks:
            if type(block) is not int or not 0 <= block < limit:
                return None
            for base in bases:
                local[place] = base + block * stride
                place += 1
        place, bases, limit = 0, self.remote_bases, self.remote_count
        stride = self.remote_stride
        for block in their_blocks:
            if type(block) is not int or not 0 <= block < limit:
                return None
            for base in bases:
                remote[place] = base + block * stride
                place += 1
        if count > 1 and len(set(their_blocks if write else our_blocks)) != count:
            return None
        return local, remote, length

    def plan(self, theirs: Blocks, mine: Blocks, write: bool) -> Segments | None:
        """The segments between these blocks; None for lists that are not in order."""
        for blocks in (theirs, mine):
            if isinstance(blocks, (list, tuple)):
                if not blocks:
                    return None
            elif not isinstance(blocks, np.ndarray) or not blocks.size:
                return None
        if len(mine) * self.tensors > SCALAR_SEGMENTS:
            found = plan_lists(
                self.local_bases, self.remote_bases, mine, theirs,
                self.local_stride, self.remote_stride, self.block_bytes,
                self.local_count, self.remote_count, write,
            )  # fmt: skip
            if found is not None:
                return found
        try:
            remote = check_blocks("theirs", theirs, self.remote_count)
            local = check_blocks("mine", mine, self.local_count)
            if write:
                check_distinct("theirs", remote, self.remote_count)
            else:
                check_distinct("mine", local, self.local_count)
            return plan_blocks(
                self.local_bases, self.remote_bases, local, remote,
                self.local_stride, self.remote_stride, self.block_bytes,
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            pass_on(error)
            return None

"""Cached routes for repeated pulls and pushes between blocks caches.

A decoder pulls a few blocks from the same cache repeatedly. Looking up link, key and bounds takes
longer than moving a block. So the result of a complete look-up is cached, and is used as long as
the peer's directory, the link and our cache do not change. Any other case, and every error, takes
the slow path, which reports errors.

:meth:`RouteCache.pull` is one function without helpers, since calls and locks are most of the cost
of a small pull.
"""

from __future__ import annotations

from array import array
from time import monotonic
from typing import TypeAlias

import numpy as np

from datadist.base.callers import pass_on
from datadist.caches.owned import OwnCache, OwnDirectory
from datadist.caches.peers import TOKENS
from datadist.control.messages import Entry
from datadist.links.permits import NON_BLOCKING, NOT_FREE
from datadist.transfers import resolve
from datadist.transfers.limits import CallLimit
from datadist.transfers.plan import (
    SCALAR_SEGMENTS,
    Blocks,
    Segments,
    check_blocks,
    check_distinct,
    plan_blocks,
)
from datadist.transfers.resolve import Route
from datadist.transfers.transfer import MIN_REUSE_SECONDS, Transfers

MAX_ROUTES = 256
SMALL_BYTES = 256 << 10
"""Largest read of the small path in bytes; such a read takes microseconds, so that repeating it is
cheap.
"""
SmallPlan: TypeAlias = "tuple[array[int], array[int], array[int]]"
"""Local addresses, remote addresses, bytes."""
RouteKey: TypeAlias = "tuple[int, ...]"
"""Cluster, model id of the blocks key, id of our cache; of a push also the tensors of a layer, so that
names of pulls and of pushes differ."""


class CachedRoute:
    """A resolved route from a blocks key of a cluster to one of our caches."""

    def __init__(
        self, cache: OwnCache, entry: Entry, route: Route, version: int, transfers: Transfers
    ) -> None:
        layout = cache.layout
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
        self.tallies = transfers.tallies(route, push=False)
        self.read_reports_control = transfers.watches_control(route)
        """Whether reads of the transport report messages that arrived meanwhile."""
        self.local_bases, self.local_count = layout.bases, layout.count
        self.remote_bases, self.remote_count = tuple(entry.bases), entry.count
        self.local_base, self.remote_base = self.local_bases[0], self.remote_bases[0]
        self.local_stride, self.remote_stride = layout.stride, entry.stride
        self.block_bytes = layout.block_bytes
        self.small = min(SCALAR_SEGMENTS, SMALL_BYTES // layout.block_bytes)
        self.lengths = [array("q", (layout.block_bytes,) * n) for n in range(self.small + 1)]
        """Vectors of ``block_bytes``, by their number."""

    def is_current(self) -> bool:
        """Whether the peer is still linked and its directory has not changed."""
        return (
            self.view.version == self.version
            and not self.session.closed
            and self.rank not in self.gone
        )

    def small_plan(self, src_blocks: list[int], dst_blocks: list[int]) -> SmallPlan | None:
        """Up to ``small`` segments of a pull; None for more, and for lists that are not in order."""
        count = len(dst_blocks)
        segments = count * self.tensors
        if count != len(src_blocks) or not 0 < segments <= self.small:
            return None
        length = self.lengths[segments]
        local, remote = length[:], length[:]  # in half the time of making new ones
        if segments == 1:  # a third of the time of the loops
            (mine,), (theirs,) = dst_blocks, src_blocks
            if type(mine) is not int or type(theirs) is not int:
                return None
            if not (0 <= mine < self.local_count and 0 <= theirs < self.remote_count):
                return None
            local[0] = self.local_base + mine * self.local_stride
            remote[0] = self.remote_base + theirs * self.remote_stride
            return local, remote, length
        if count > 1 and len(set(dst_blocks)) != count:
            return None
        place, bases, limit = 0, self.local_bases, self.local_count
        stride = self.local_stride
        for block in dst_blocks:
            if type(block) is not int or not 0 <= block < limit:
                return None
            for base in bases:
                local[place] = base + block * stride
                place += 1
        place, bases, limit = 0, self.remote_bases, self.remote_count
        stride = self.remote_stride
        for block in src_blocks:
            if type(block) is not int or not 0 <= block < limit:
                return None
            for base in bases:
                remote[place] = base + block * stride
                place += 1
        return local, remote, length

    def plan(self, theirs: Blocks, mine: Blocks, write: bool) -> Segments | None:
        """The segments between these blocks; None for lists that are not in order."""
        for blocks in (theirs, mine):
            if isinstance(blocks, (list, tuple)):
                if not blocks:
                    return None
            elif not isinstance(blocks, np.ndarray) or not blocks.size:
                return None
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


class RouteCache:
    """Cached routes by key; every method works from any thread."""

    def __init__(self, transfers: Transfers, owned: OwnDirectory) -> None:
        self._transfers = transfers
        self._owned = owned
        self._routes: dict[RouteKey, CachedRoute] = {}

    def remember(
        self, key: RouteKey, cache: OwnCache, entry: Entry, route: Route, version: int
    ) -> None:
        """Keep what a full transfer of all layers found; ``version`` is that of the look-up.

        Unless a newer link serves by now: one that comes later changes the version; unless segments
        have to be cut; and unless the caches agree on the tensors of a layer only since the caller
        named a number.
        """
        layout = cache.layout
        agreed = layout.tensors_per_layer == entry.tensors_per_layer
        if not agreed or layout.cuts or entry.cuts or not self._transfers.serves(route):
            return
        if len(self._routes) >= MAX_ROUTES:
            self._routes.clear()
        self._routes[key] = CachedRoute(cache, entry, route, version, self._transfers)

    def clear(self) -> None:
        """Forget all routes."""
        self._routes.clear()

    def pull(
        self, key: RouteKey, src_blocks: Blocks, dst_blocks: Blocks, limit: CallLimit | None = None
    ) -> bool:
        """Pull over a cached route; False if the pull must be repeated on the slow path.

        It may have written to the destination blocks then. Without a ``limit`` that of the engine counts.

        Raises LLMException as the slow path does.
        """
        started = monotonic()
        cached = self._routes.get(key)
        if cached is None:
            return False
        if cached.read_reports_control and type(src_blocks) is list and type(dst_blocks) is list:
            small = cached.small_plan(src_blocks, dst_blocks)
            done = None if small is None else self._pull_small(cached, small, started, limit)
            if done:
                if limit is not None:
                    limit.peer = cached.view
                return True
            if done is False:
                self._routes.pop(key, None)
                return False
        return self._move(key, cached, cached.plan(src_blocks, dst_blocks, False), limit, False)

    def push(
        self, key: RouteKey, src_blocks: Blocks, dst_blocks: Blocks, limit: CallLimit | None = None
    ) -> bool:
        """Push over a cached route; False if nothing was written and the push must take the slow
        path.

        Raises LLMException as the slow path does.
        """
        cached = self._routes.get(key)
        if cached is None:
            return False
        return self._move(key, cached, cached.plan(dst_blocks, src_blocks, True), limit, True)

    def _move(
        self,
        key: RouteKey,
        cached: CachedRoute,
        segments: Segments | None,
        limit: CallLimit | None,
        write: bool,
    ) -> bool:
        if segments is None:
            return False
        layers = cached.tensors // key[-1] if write else 1
        limit = CallLimit() if limit is None else limit
        limit.begin(self._transfers.timeout * layers)
        token, done = next(TOKENS), False
        try:
            if (
                self._owned.pin(cached.cache, token)
                and cached.session.settled()
                and cached.view.begin_pull_at(cached.version, token)
            ):
                self._transfers.move(cached.route, segments, limit, cached.entry, write)
                done = True
            cached.view.end_pull(token)  # as _end, without the call
            self._owned.unpin(cached.cache, token)
        except BaseException as error:
            cached.view.pulls.discard(token)  # in C: no handler of a signal comes before these
            cached.cache.pins.discard(token)
            self._end(cached, token)
            if not isinstance(error, resolve.Ended):
                raise
        if not done:
            self._routes.pop(key, None)
        return done

    def _pull_small(
        self, cached: CachedRoute, small: SmallPlan, started: float, limit: CallLimit | None
    ) -> bool | None:
        """Read and then check that the route was still valid; None if the link has no free permit."""
        view, transfers = cached.view, self._transfers
        local, remote, length = small
        link, rank, token = cached.attempt.link, cached.rank, next(TOKENS)
        control_readable: bool | None = None
        acquired: list[bool] = []
        try:
            if cached.line:
                return None
            try:
                acquired += map(cached.take_permit, NON_BLOCKING)  # noted in C, see Permits
            except NOT_FREE as error:
                pass_on(error)
                return None
            if (
                self._owned.pin(cached.cache, token)
                and view.begin_pull_at(cached.version, token)
                and not (link is None or cached.attempt.dead or rank in cached.gone)
            ):
                control_readable = link.read(
                    rank, local, remote, length,
                    transfers.timeout if limit is None else limit.begin(transfers.timeout).seconds,
                )  # fmt: skip
            view.end_pull(token)  # as _end, without the call
            self._owned.unpin(cached.cache, token)
        except BaseException as error:
            try:
                try:
                    transfers.keep(cached.route, error, local, length, write=False)
                except BaseException:  # a handler of a signal: once more, which does no harm
                    transfers.keep(cached.route, error, local, length, write=False)
                    raise
            finally:
                cached.view.pulls.discard(token)  # in C: no handler of a signal comes before these
                cached.cache.pins.discard(token)
                self._end(cached, token)
            if not isinstance(error, Exception):
                raise
            pass_on(error)
            if not (cached.session.settled() and cached.is_current()):
                return False
            transfers.count(cached.route, False, 0, started, failed=True)
            raise transfers.failure(cached.route, error, "pull from") from error
        finally:
            if True in acquired:
                cached.release_permit()
        seconds = monotonic() - started
        if control_readable is not False:
            return False
        # What was being handled has changed the way once that is done, so this order counts. The
        # rest is `is_current`, without the call.
        session = cached.session
        if (
            session.dispatching
            or view.version != cached.version
            or session.closed
            or rank in cached.gone
            or (seconds > MIN_REUSE_SECONDS and not cached.entry.pooled)
        ):
            return False
        nbytes, (one, every) = cached.block_bytes * len(length), cached.tallies
        with transfers.counting:  # as count_done, without the call
            one.add(nbytes, seconds)
            every.add(nbytes, seconds)
        return True

    def _end(self, cached: CachedRoute, token: int) -> None:
        """Note that a pull ended, as far as it had begun."""
        cached.view.end_pull(token)
        self._owned.unpin(cached.cache, token)

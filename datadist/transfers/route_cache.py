"""Cached routes for repeated pulls and pushes between blocks caches.

A decoder pulls a few blocks from the same cache repeatedly. Looking up link, key and bounds takes
longer than moving a block. So the result of a complete look-up is cached, and is used as long as
the peer's directory, the link and our cache do not change. Any other case, and every error, takes
the slow path, which reports errors.

:meth:`RouteCache._move_small` is one function without helpers, since calls and locks are most of the
cost of a small transfer.
"""

from __future__ import annotations

from time import monotonic
from typing import TypeAlias

from datadist.base.callers import pass_on
from datadist.caches.owned import OwnCache, OwnDirectory
from datadist.caches.peers import TOKENS
from datadist.control.messages import Entry
from datadist.links.counters import MOST_NOTED
from datadist.links.permits import NON_BLOCKING, NOT_FREE
from datadist.transfers import resolve
from datadist.transfers.block_lists import Blocks
from datadist.transfers.cached_route import CachedRoute, SmallPlan
from datadist.transfers.limits import CallLimit
from datadist.transfers.plan import Segments
from datadist.transfers.resolve import Route
from datadist.transfers.transfer import MIN_REUSE_SECONDS, Transfers

MAX_ROUTES = 256
RouteKey: TypeAlias = "tuple[int, ...]"
"""Cluster, model id of the blocks key, id of our cache; of a push also the tensors of a layer, so that
names of pulls and of pushes differ."""


class RouteCache:
    """Cached routes by key; every method works from any thread."""

    def __init__(self, transfers: Transfers, owned: OwnDirectory) -> None:
        self._transfers = transfers
        self._owned = owned
        self._caches = owned.caches
        self._routes: dict[RouteKey, CachedRoute] = {}

    def remember(
        self, key: RouteKey, cache: OwnCache, entry: Entry, route: Route, version: int,
        layers: int | None = None,
    ) -> None:  # fmt: skip
        """Keep what a full transfer of all layers found; ``version`` is that of the look-up.

        ``layers`` as for :class:`CachedRoute`.

        Unless a newer link serves by now: one that comes later changes the version; unless segments
        have to be cut; and unless the caches agree on the tensors of a layer only since the caller
        named a number.
        """
        layout = cache.layout
        agreed = layout.tensors_per_layer == entry.tensors_per_layer
        if not agreed or layout.cuts or entry.cuts or not self._transfers.serves(route):
            return
        if route.attempt.dead:  # `forget_ended` may have been here before
            return
        if len(self._routes) >= MAX_ROUTES:
            self._routes.clear()
        self._routes[key] = CachedRoute(
            cache, self._owned, entry, route, version, self._transfers, layers
        )

    def forget_ended(self) -> None:
        """Forget routes over links that have ended, and to peers that are gone."""
        for key, cached in list(self._routes.items()):
            if cached.attempt.dead or cached.rank in cached.gone:
                self._routes.pop(key, None)

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
        cached = self._routes.get(key)
        if cached is None:
            return False
        if cached.known is not None and self._move_known(
            key, cached, src_blocks, dst_blocks, limit, False
        ):
            return True
        if cached.moves_small and type(src_blocks) is list and type(dst_blocks) is list:
            small = cached.small_plan(src_blocks, dst_blocks)
            if small is not None:
                done = self._move_small(key, cached, small, limit, False)
                if done is not None:
                    if limit is not None:
                        limit.peer = cached.view  # read only where that went well
                    return done
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
        if cached.known is not None and self._move_known(
            key, cached, dst_blocks, src_blocks, limit, True
        ):
            return True
        if cached.moves_small and type(src_blocks) is list and type(dst_blocks) is list:
            small = cached.small_plan(dst_blocks, src_blocks, True)
            if small is not None:
                done = self._move_small(key, cached, small, limit, True)
                if done is not None:
                    if limit is not None:
                        limit.peer = cached.view  # read only where that went well
                    return done
        return self._move(key, cached, cached.plan(dst_blocks, src_blocks, True), limit, True)

    def _move_known(
        self, key: RouteKey, cached: CachedRoute, theirs: Blocks, ours: Blocks,
        limit: CallLimit | None, write: bool,
    ) -> bool:  # fmt: skip
        """Few blocks in one step of the transport; False where any other way is to be taken."""
        try:
            took = cached.known(  # type: ignore[misc]
                theirs,
                ours,
                cached.seconds if limit is None else limit.begin(cached.seconds).seconds,
            )
        except Exception as error:
            return self._failed(key, cached, error, monotonic(), limit, write)
        if took is None or (took > MIN_REUSE_SECONDS and not (write or cached.entry.pooled)):
            return False
        ledger = self._transfers.ledger
        ledger.noted.append((next(TOKENS), cached.tallies, cached.known_bytes * len(ours), took))
        if len(ledger.noted) > MOST_NOTED:
            ledger.add_up()
        if limit is not None:
            limit.peer = cached.view  # read only where that went well
        return True

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
        limit = CallLimit() if limit is None else limit
        limit.begin(cached.seconds)
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
        return done or self._forget(key)

    def _move_small(
        self,
        key: RouteKey,
        cached: CachedRoute,
        small: SmallPlan,
        limit: CallLimit | None,
        write: bool,
    ) -> bool | None:
        """Read and then check that the route was still valid, or check that it is and write.

        False if it was not; None if the link has no free permit.
        """
        started = monotonic()
        local, remote, length = small
        cache, view, session, rank = cached.cache, cached.view, cached.session, cached.rank
        attempt, token = cached.attempt, next(TOKENS)
        heard: bool | None = True  # also where nothing is moved
        acquired: list[bool] = []
        try:
            if cached.line:
                return None
            try:
                acquired += map(cached.take_permit, NON_BLOCKING)  # noted in C, see Permits
            except NOT_FREE as error:
                pass_on(error)
                return None
            # As OwnDirectory.pin and PeerView.begin_pull_at, without the calls: noted, then checked.
            cache.pins.add(token)
            view.pulls.add(token)
            if (
                cache.held
                and cache.cache_id in self._caches
                and (not write or session.settled())
                and view.version == cached.version
                and not (attempt.dead or rank in cached.gone)
                and (link := attempt.link) is not None
            ):
                operate = link.write if write else link.read
                heard = operate(
                    rank, local, remote, length,
                    cached.seconds if limit is None else limit.begin(cached.seconds).seconds,
                )  # fmt: skip
            view.pulls.discard(token)  # as _end, without the calls
            cache.pins.discard(token)
            if view.deferred or cache.cache_id not in self._caches:
                self._end(cached, token)
        except BaseException as error:
            try:
                try:
                    self._transfers.keep(cached.route, error, local, length, write)
                except BaseException:  # a handler of a signal: once more, which does no harm
                    self._transfers.keep(cached.route, error, local, length, write)
                    raise
            finally:
                view.pulls.discard(token)  # in C: no handler of a signal comes before these
                cache.pins.discard(token)
                self._end(cached, token)
            if not isinstance(error, Exception):
                raise
            return self._failed(key, cached, error, started, limit, write)
        finally:
            if True in acquired:
                cached.release_permit()
        took = monotonic() - started
        # What was being handled has changed the way once that is done, so this order counts. The
        # rest is `is_current`, without the call.
        if heard or (
            not write
            and (
                heard is None
                or session.dispatching
                or view.version != cached.version
                or session.closed
                or rank in cached.gone
                or (took > MIN_REUSE_SECONDS and not cached.entry.pooled)
            )
        ):
            return self._forget(key)
        ledger = self._transfers.ledger
        ledger.noted.append((token, cached.tallies, cached.block_bytes * len(length), took))
        if len(ledger.noted) > MOST_NOTED:
            ledger.add_up()
        return True

    def _forget(self, key: RouteKey) -> bool:
        """The slow path is to be taken: False."""
        self._routes.pop(key, None)
        return False

    def _failed(
        self, key: RouteKey, cached: CachedRoute, error: Exception, started: float,
        limit: CallLimit | None, write: bool,
    ) -> bool:  # fmt: skip
        """What the transport raised: False where a read is worth another one on the slow path.

        Raises what the user gets, and what is the caller's own.
        """
        pass_on(error)
        if not write and not (cached.session.settled() and cached.is_current()):
            return self._forget(key)
        self._transfers.count(cached.route, write, 0, started, failed=True)
        what = "push to" if write else "pull from"
        limit = CallLimit().begin(cached.seconds) if limit is None else limit
        raise self._transfers.failure(cached.route, error, what, limit) from error

    def _end(self, cached: CachedRoute, token: int) -> None:
        """Note that a pull ended, as far as it had begun."""
        cached.view.end_pull(token)
        self._owned.unpin(cached.cache, token)

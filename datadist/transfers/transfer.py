"""Runs every transfer: its route, the permit of the link, its errors and counters."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING

from datadist.base.callers import pass_on
from datadist.caches.owned import OwnCache
from datadist.caches.peers import TOKENS, PeerView
from datadist.caches.quarantine import Kept, Quarantine, Ranges
from datadist.control.messages import Entry
from datadist.control.session import Session
from datadist.links.counters import Counters, Ledger, Tally
from datadist.links.domain import Domain
from datadist.links.permits import Permits
from datadist.status import LLMException, LLMStatusCode, param_invalid
from datadist.transfers import resolve
from datadist.transfers.limits import CallLimit
from datadist.transfers.pieces import MIN_PIECE, move_pieces
from datadist.transfers.plan import Segments
from datadist.transfers.resolve import Found, Route
from datadist.transport import (
    AddressError,
    InFlight,
    TransferError,
    TransferTimeout,
    TransportError,
    Unsupported,
)
from datadist.transports.defects import text_of

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger("datadist.transfer")

STATUS_OF: tuple[tuple[type[TransportError], LLMStatusCode], ...] = (
    (TransferTimeout, LLMStatusCode.LLM_TIMEOUT),
    (AddressError, LLMStatusCode.LLM_PARAM_INVALID),
    (Unsupported, LLMStatusCode.LLM_FEATURE_NOT_ENABLED),
)
"""Status of a transport's errors; what is not listed is LLM_FAILED."""
TURN_SECONDS = 0.005
"""A piece of a transfer that holds the last permit of its link takes about so long."""
CANCEL_SECONDS = 0.1
"""The same for a transfer that can be cancelled, while the link has more permits."""
MIN_REUSE_SECONDS = 0.5
"""An owner never reuses memory sooner than this after it has told a reader, which may be stopped."""


class Transfers:
    """Moves segments between linked clusters; every method works from any thread."""

    def __init__(
        self,
        own_cluster: int,
        timeout: float,
        domains: Callable[[], list[Domain]],
        views: dict[str, PeerView],
        drain: Callable[[Session, float], bool],
        verify: Callable[[Route, Segments, float], None] | None = None,
        quarantine: Quarantine | None = None,
    ) -> None:
        self._own_cluster = own_cluster
        self.timeout = timeout
        """Seconds that one transfer may take."""
        self._domains = domains
        self._views = views
        self._drain = drain
        self.verify = verify
        """Compares what was moved with the peer's memory, after every transfer."""
        self._quarantine = Quarantine() if quarantine is None else quarantine
        self.on_broken: Callable[[Route, str], None] = lambda _route, _reason: None
        """Called when the transport can no longer reach a peer over a link."""
        self.counters = Counters()
        """Of all links there were."""
        self.ledger = Ledger()
        """Guards all counters, those of the links as well."""

    def watches_control(self, route: Route) -> bool:
        """Whether a read says what arrived meanwhile; not where more than the read has to be done."""
        return self.verify is None and route.capabilities.watches_control

    def reads_in_order(self, route: Route) -> bool:
        """Whether what is read last says that all else is as it was by then."""
        return self.verify is None and route.capabilities.ordered_reads

    def check_cluster(self, cluster: int) -> None:
        """Raise LLM_PARAM_INVALID for our own cluster."""
        if cluster == self._own_cluster:
            raise param_invalid(
                f"the key names cluster {cluster}, which is this engine: name the owner's cluster"
            )

    def names(self, cluster: int) -> bool:
        """Whether a link names the cluster, in whatever state it is."""
        return any(cluster in domain.others for domain in self._domains())

    def routes(self, cluster: int, deadline: float) -> list[Route]:
        """Usable links to a cluster, after all its received messages were handled.

        Raises LLM_NOT_YET_LINK.
        """
        domains = self._domains()
        routes = resolve.routes_to(domains, self._views, cluster)
        views = [route.view for route in routes[:1]]
        if (
            not routes
        ):  # the peer may be OK already, and the message that makes us OK may have arrived
            views = resolve.members_of(domains, self._views, cluster)
        late = [view.session for view in views if not view.session.settled()]
        for session in late:
            self._drain(session, max(0.0, deadline - monotonic()))
        if late:
            routes = resolve.routes_to(domains, self._views, cluster)
        if not routes:
            raise resolve.no_route(domains, cluster)
        return routes

    def serves(self, route: Route) -> bool:
        """Whether the newest link to the route's cluster leads to the same engine."""
        cluster = route.view.session.cluster_id
        routes = resolve.routes_to(self._domains(), self._views, cluster)
        return bool(routes) and routes[0].view is route.view

    def move_over(self, routes: list[Route], move: Callable[[Route], None]) -> Route:
        """``move`` over the first of ``routes`` that has not ended meanwhile; returns that one."""
        for route in routes:
            with suppress(resolve.Ended):
                move(route)
                return route
        raise resolve.no_route(
            self._domains(), routes[0].attempt.members[routes[0].rank].cluster_id
        )

    def move(
        self,
        route: Route,
        segments: Segments,
        limit: CallLimit,
        source: Entry | None = None,
        write: bool = False,
        before: Callable[[], None] | None = None,
        after: Callable[[], None] | None = None,
    ) -> None:
        """Read the segments from a peer, or ``write`` them to it, with a permit of this link and rank.

        ``source`` is the cache that is read, where we know it. ``before`` and ``after`` are called
        with that permit, beside other transfers where the link has several; ``after`` on success.

        Raises LLMException: the status of :data:`STATUS_OF` for what the transport raises,
        LLM_TIMEOUT when others keep the link busy, the codes of :meth:`_check_kept`, and
        :class:`resolve.Ended` when it ended meanwhile, which does not count.
        """
        started = monotonic()
        failed: bool | None = True
        attempt, rank = route.attempt, route.rank
        permits = attempt.permits[rank]
        acquired: list[bool] = []
        try:
            try:
                self._take(permits, acquired, route, limit)
                if attempt.dead or rank in attempt.gone or attempt.link is None:
                    failed = None
                    cluster = attempt.members[rank].cluster_id
                    raise resolve.no_route(self._domains(), cluster, resolve.Ended)
                if before is not None:
                    before()
                self._move_turns(route, segments, limit, write, acquired)
                if not write:
                    self._check_kept(route, source, limit)
                if self.verify is not None:
                    self.verify(route, segments, limit.deadline)
                if after is not None:
                    after()
            finally:
                if True in acquired:
                    permits.release()
            failed = False
            limit.peer = route.view
        except LLMException:
            raise
        except Exception as error:
            what = "push to" if write else "pull from"
            raise self.failure(route, error, what, limit) from error
        finally:
            if failed is not None:
                self.count(route, write, segments.nbytes, started, failed)

    def _move_turns(
        self, route: Route, segments: Segments, limit: CallLimit, write: bool, acquired: list[bool]
    ) -> None:
        """Move the segments, in pieces where others may wait for our permit or the user may cancel."""
        _check_cancelled(limit, 0, segments.nbytes)
        permits = route.attempt.permits[route.rank]
        shared = not permits.free
        if segments.nbytes <= MIN_PIECE or not (shared or limit.in_pieces):
            self.operate(route, segments, limit, write)
            return

        def turn(moved: int) -> None:
            _check_cancelled(limit, moved, segments.nbytes)
            if permits.line:
                self._let_others_go(route, acquired, limit)
            if not limit.left:
                raise LLMException(
                    f"{moved} of {segments.nbytes} bytes were moved over {route.domain} within {limit}",
                    status_code=LLMStatusCode.LLM_TIMEOUT,
                )

        seconds = TURN_SECONDS if shared else CANCEL_SECONDS
        move_pieces(segments, seconds, lambda piece: self.operate(route, piece, limit, write), turn)

    def operate(self, route: Route, segments: Segments, limit: CallLimit, write: bool) -> None:
        """One read or write of the link, with a permit. Raises what the transport raises."""
        link = route.attempt.link
        assert link is not None
        operate = link.write if write else link.read
        try:
            operate(route.rank, segments.local, segments.remote, segments.length, limit.left)
        except BaseException as error:
            # Also one of the caller's own may come with a transfer that goes on.
            kept = route, error, segments.local, segments.length, write
            try:
                self.keep(*kept)
            except BaseException:  # a handler of a signal: once more, which does no harm
                self.keep(*kept)
                raise
            raise

    def _let_others_go(self, route: Route, acquired: list[bool], limit: CallLimit) -> None:
        """Give the permit to those who wait, and wait for it behind them.

        A link that is being closed waits for who does this as for who holds a permit.
        """
        attempt, token = route.attempt, next(TOKENS)
        permits = attempt.permits[route.rank]
        try:
            attempt.between_pieces.add(token)
            if attempt.dead:
                return
            permits.give_back(acquired)
            self._take(permits, acquired, route, limit)
            if attempt.closed:
                raise TransferError("the link was closed meanwhile")
        finally:
            attempt.between_pieces.discard(token)

    def _check_kept(self, route: Route, source: Entry | None, limit: CallLimit) -> None:
        """Raise if the owner may have reused the memory during the read.

        An owner waits for a limited time for a reader that does not answer, and not at all for a
        reader whose connection was lost. Before it reuses memory it sends a message. The message
        has arrived after the read, or is still queued at the owner because we did not read. So
        after a long pull the owner is asked.

        Raises LLM_FAILED for an owner that has ended or left, LLM_KV_CACHE_NOT_EXIST for a cache
        that is registered no more. Memory of a pool is kept for as long as a pull goes on.
        """
        session = route.view.session
        late = limit.elapsed > MIN_REUSE_SECONDS
        left = max(1.0, limit.left)
        confirmed = session.settled() or self._drain(session, left)
        _check_unrevoked(route, source)
        if late and source is not None and not source.pooled:
            confirmed = route.view.synchronize(left)
            _check_unrevoked(route, source)
        if not confirmed:
            raise _overtaken(
                route, "the owner did not confirm that the data is still valid (is it stopped?)"
            )

    def _take(self, permits: Permits, acquired: list[bool], route: Route, limit: CallLimit) -> None:
        """Take a permit of a link and rank; True is in ``acquired`` once that is done."""
        permits.take(acquired, limit.left)
        if True not in acquired:
            others = (
                "another transfer" if permits.count == 1 else f"{permits.count} other transfers"
            )
            raise LLMException(
                f"{others} over {route.domain} took longer than {limit}",
                status_code=LLMStatusCode.LLM_TIMEOUT,
            )

    def keep(
        self, route: Route, error: BaseException, local: Buffer, length: Buffer, write: bool
    ) -> None:
        """Keep the local ranges of a transfer that goes on; while the call still holds its tokens.

        Called again where a handler of a signal raises in it. The handler may also have raised after the
        transport did: then the transport's error is the context of its own.
        """
        flights = _in_flight(error)
        if not flights:
            return
        cluster = route.attempt.members[route.rank].cluster_id
        what = "push to" if write else "pull from"
        text = f"a {what} cluster {cluster} over {route.domain}"
        ranges = Ranges(local, length)
        for flight in flights:
            if self._quarantine.knows(flight):  # also of a call whose error is being handled
                continue
            kept = Kept(flight, ranges, route.attempt, route.rank, text)
            token = -id(flight)  # not in TOKENS, and the same when this is called again
            if kept.settled():
                route.view.end_pull(token)
                continue
            if write:  # its peer is told that we have stopped only when it has settled
                kept.release = partial(route.view.end_pull, token)
                route.view.prolong(token)
            self._quarantine.keep(kept)

    def tallies(self, route: Route, push: bool) -> tuple[Tally, Tally]:
        """Where operations over a link are counted: for that link, and for all."""
        link, total = route.attempt.counters[route.rank], self.counters
        return (link.push, total.push) if push else (link.pull, total.pull)

    def count(self, route: Route, push: bool, nbytes: int, started: float, failed: bool) -> None:
        """Count an operation that began at ``started`` (time.monotonic)."""
        tallies, seconds = self.tallies(route, push), monotonic() - started
        with self.ledger.lock:
            for tally in tallies:
                if failed:
                    tally.add_error(seconds)
                else:
                    tally.add(nbytes, seconds)

    def leads_to(self, view: PeerView) -> bool:
        """Whether a usable link leads to that engine."""
        routes = resolve.routes_to(self._domains(), self._views, view.session.cluster_id)
        return any(route.view is view for route in routes)

    def failure(
        self, route: Route, error: Exception, what: str, limit: CallLimit | None = None
    ) -> LLMException:
        """Convert an exception of the transport to the exception for the user."""
        cluster = route.attempt.members[route.rank].cluster_id
        text = text_of(error, route.attempt.link)
        if isinstance(error, TransferError) and not error.link_usable:
            known = route.rank in route.attempt.gone
            text = route.attempt.gone.setdefault(route.rank, f"cluster {cluster}: {text}")
            if not known:
                self.on_broken(route, text)
            text += "; unlink and link again"
        elif isinstance(error, TransferTimeout):
            text += f"; the call has {limit or CallLimit().begin(self.timeout)}"
        if getattr(error, "in_flight", None) is not None:
            text += (
                "; the transport cannot stop it (the peer is stopped, or a page of either end does not "
                "come: userfaultfd, a file system that hangs), so the transfer goes on, and its memory "
                "here is not used again until it has settled"
            )
        status = next((s for t, s in STATUS_OF if isinstance(error, t)), LLMStatusCode.LLM_FAILED)
        return LLMException(
            f"the {what} cluster {cluster} over {route.domain} failed: {text}", status_code=status
        )


def _check_cancelled(limit: CallLimit, moved: int, nbytes: int) -> None:
    """Raise LLM_FAILED for a transfer that its user has cancelled."""
    if limit.cancelled:
        raise LLMException(
            f"the transfer was cancelled after {moved} of {nbytes} bytes",
            status_code=LLMStatusCode.LLM_FAILED,
        )


def _in_flight(error: BaseException | None) -> list[InFlight]:
    """What goes on, as an exception says, or one that was being handled when it was raised."""
    flights = []
    while error is not None:
        flight = getattr(error, "in_flight", None)
        if flight is not None:
            flights.append(flight)
        error = error.__context__
    return flights


def _check_unrevoked(route: Route, source: Entry | None) -> None:
    """Raise if the owner revoked the cache during the read, see :meth:`Transfers._check_kept`."""
    if route.view.session.closed or route.rank in route.attempt.gone:
        reason = route.attempt.gone.get(route.rank, "its connection has ended")
        raise _overtaken(route, f"{reason}; unlink and link again")
    if source is None or source.pooled or source.cache_id in route.view.directory.entries:
        return
    raise _overtaken(
        route,
        f"cache {source.cache_id} was unregistered there meanwhile",
        LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
    )


def _overtaken(
    route: Route, why: str, status: LLMStatusCode = LLMStatusCode.LLM_FAILED
) -> LLMException:
    cluster = route.attempt.members[route.rank].cluster_id
    return LLMException(
        f"the pull from cluster {cluster} over {route.domain} was too slow, and the memory may "
        f"have been reused during the read: {why}",
        status_code=status,
    )


def check_accessible(cache: OwnCache) -> None:
    """Raise LLM_PARAM_INVALID for a local cache that peers must not reach (one-sided mode)."""
    if not cache.accessible:
        raise param_invalid(
            f"cache {cache.cache_id} is not remote accessible, which one-sided mode needs at both "
            "ends: register it with remote_accessible=True before link"
        )


def check_entry_accessible(found: Found) -> None:
    """Raise LLM_PARAM_INVALID for a peer's cache that must not be reached (one-sided mode)."""
    if not found.entry.accessible:
        raise param_invalid(
            f"cache {found.entry.cache_id} of the owner is not remote accessible: it must be "
            "registered there with remote_accessible=True before link"
        )


class as_param_invalid:  # noqa: N801 - used as one of contextlib is, in a quarter of the time
    """Turn ``ValueError`` into LLM_PARAM_INVALID."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if isinstance(error, ValueError):
            pass_on(error)
            raise param_invalid(str(error)) from None

"""Reports which members an incomplete link waits for: on request, on failure, and in one early
warning.
"""

from __future__ import annotations

import logging
import time

from datadist.caches.peers import PeerView
from datadist.control.discovery import Discovery
from datadist.control.reactor import Reactor
from datadist.control.unreachable_engines import UnreachableEngine, find_unreachable_engines
from datadist.links.domain import TableDomain
from datadist.links.matching import differences
from datadist.links.rendezvous import Rendezvous

log = logging.getLogger("datadist.link")

WARN_SECONDS = 5.0
"""A link that is not complete by then gets one warning."""
SEARCH_SECONDS = 1.0
"""Longest wait for what is found elsewhere, before the warning goes without."""
MAX_SEEN = 3
"""Engines elsewhere that are named for one member, those of the same directory first."""
MOST_NAMES = 4
"""Links of a peer that are named because it waits for these instead."""
MAX_OTHERS = 4
"""Cluster ids that are named because they are here instead."""


class MissingMembers:
    """Reports the missing members of a domain and other engines that are here; on the reactor's
    thread.
    """

    def __init__(
        self,
        reactor: Reactor,
        discovery: Discovery,
        views: dict[str, PeerView],
        rendezvous: Rendezvous,
    ) -> None:
        self._reactor = reactor
        self._discovery = discovery
        self._views = views
        self._rendezvous = rendezvous
        self._due: dict[TableDomain, bool] = {}
        """Domains whose members are to be looked for, and whether to warn."""
        self._looking = False

    def watch(self, domain: TableDomain) -> None:
        """Warn after some seconds if the domain still waits; with less time, only search for members."""
        seconds = domain.deadline - time.monotonic()
        warn = seconds > WARN_SECONDS
        delay = WARN_SECONDS if warn else seconds / 2
        domain.search_timer = self._reactor.later(delay, lambda: self._request_search(domain, warn))

    def _request_search(self, domain: TableDomain, warn: bool) -> None:
        if domain.waiting:
            if not self._due:
                self._reactor.post(self._search)
            self._due[domain] = warn

    def _search(self) -> None:
        """Find missing members in other jobs and directories: once for all domains that are due."""
        due, self._due = self._due, {}
        absent = {c for domain in due for c in domain.others if not self._met(c)}
        if absent and self._start(due, absent):
            self._reactor.later(SEARCH_SECONDS, lambda: self._report(due))
        else:
            self._report(due)

    def _start(self, due: dict[TableDomain, bool], absent: set[int]) -> bool:
        """Look on a thread of the helpers; False where the last one still looks."""

        def look() -> None:
            try:
                found = find_unreachable_engines(self._discovery.directory, absent)
            finally:
                self._looking = False
            self._reactor.post(lambda: self._found(due, found))

        if self._looking:
            return False
        self._looking = True
        self._reactor.helpers.submit(look, owner=self)
        return True

    def _found(self, due: dict[TableDomain, bool], found: list[UnreachableEngine]) -> None:
        for domain in due:
            domain.unreachable = [each for each in found if each.cluster_id in domain.others]
        self._report(due)

    def _report(self, due: dict[TableDomain, bool]) -> None:
        """Warn once of the domains that still wait, with the results found so far."""
        while due:
            domain, warn = due.popitem()
            if warn and domain.waiting:
                self._warn(domain)

    def _warn(self, domain: TableDomain) -> None:
        now = time.monotonic()
        log.warning(
            "%s is not complete after %.0f s and waits for %.0f s more: %s",
            domain, now - domain.created, max(0.0, domain.deadline - now), self.missing(domain),
        )  # fmt: skip

    def missing(self, domain: TableDomain) -> str:
        """Who or what a domain waits for, for people."""
        waiting, network = self._waiting_for(domain), self._rendezvous.explain(domain)
        if domain.last_failure is not None:
            waiting += f"; an attempt was given up: {domain.last_failure}"
        return waiting if network is None else f"{waiting}; network: {network}"

    def _waiting_for(self, domain: TableDomain) -> str:
        if domain.attempt is not None:
            return f"stage: {domain.attempt.stage()}"
        ready = {view.session.cluster_id for view, _ in self.matching_announcements(domain)}
        missing = [
            self._absence(domain, cluster, rank)
            for cluster, rank in sorted(domain.others.items(), key=lambda item: item[1])
            if cluster not in ready
        ]
        return "; ".join(missing) or (
            "every cluster is there, but rank 0 has not begun (is it stopped or busy?)"
        )

    def matching_announcements(self, domain: TableDomain) -> list[tuple[PeerView, int]]:
        """The peers that wait for the same domain, and their link ids."""
        return [
            (view, link)
            for view in self._views.values()
            for link in view.announcements.with_key(domain.domain_key)
        ]

    def _met(self, cluster: int) -> list[PeerView]:
        return [view for view in self._views.values() if view.session.cluster_id == cluster]

    def _absence(self, domain: TableDomain, cluster: int, rank: int) -> str:
        who = f"cluster {cluster} (rank {rank})"
        met = self._met(cluster)
        if met:
            return "; ".join(f"{who} {_instead(domain, view)}" for view in met)
        stranger = self._discovery.strangers.get(cluster)
        if stranger is not None:
            return (
                f"{who} is here, but belongs to another user ({stranger}): run both as one user, in "
                "containers with one mapping of users"
            )
        here = {engine.cluster_id for engine in self._discovery.directory.engines()}
        if cluster in here:
            return (
                f"{who} has not called link: an engine with its cluster id is here, but does not answer "
                "(is it stopped or busy?)"
            )
        absent = f"{who} has not called link, and no engine with its cluster id is here" + _listed(
            sorted(here - set(domain.ranks))
        )
        seen = [str(each) for each in domain.unreachable if each.cluster_id == cluster]
        return f"{absent}, but elsewhere: {'; '.join(seen[:MAX_SEEN])}" if seen else absent


def _listed(others: list[int]) -> str:
    """Clusters that are here instead."""
    if not others:
        return ""
    more = ", ..." if others[MAX_OTHERS:] else ""
    return f" (other clusters are: {', '.join(map(str, others[:MAX_OTHERS]))}{more})"


def _instead(domain: TableDomain, view: PeerView) -> str:
    """What a member that does not wait for the domain does."""
    here = f"is here ({view.session.peer_and_program})"
    names = sorted({each.message.name for each in view.announcements})
    for each in view.announcements:
        if each.message.name == domain.name:
            differ = differences(
                domain.announce, domain.own_cluster, each.message, view.session.cluster_id
            )
            return f"{here} and waits with this comm_name, but {differ}"
    if names:
        more = ", ..." if names[MOST_NAMES:] else ""
        some = ", ".join(map(repr, names[:MOST_NAMES])) + more
        return f"{here} and waits with comm_name {some}, not {domain.name!r}"
    gone = ", ".join(map(repr, view.announcements.withdrawn))
    ended = f", or has unlinked (it waited with comm_name {gone})" if gone else ", or has unlinked"
    return f"{here}, but has not called link with this engine (again){ended}"

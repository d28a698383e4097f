"""Warnings where one cluster id names two live engines: ours may be linked with the foreign one.

Everything here runs on the reactor's thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from datadist.base.pidfds import has_ended
from datadist.base.seen_cases import SeenCases
from datadist.caches.peers import PeerView
from datadist.control.discovery import Discovery
from datadist.control.messages import Duplicate, Hello
from datadist.control.process import described, printable
from datadist.control.runtime_dir import Address
from datadist.links.domain import Domain, PairDomain

log = logging.getLogger("datadist.link")

REMEDY = (
    "if they belong to different jobs, set DATADIST_JOB to a name of its own for each job; else give "
    "every engine a cluster id of its own"
)
REPORTED_ACTIONS = {
    "replaced": "ended its link with this engine for one with",
    "took": "ended for this engine its link with",
}
"""Texts for the action of a peer that found our cluster id at two engines."""
AFTER_SECONDS = 0.1
"""A link is looked at so long after it is OK: the first transfers, which follow at once, go first."""
MAX_REPORTED = 256
MAX_REPORTS_PER_PEER = 8
"""Most warnings that the reports of one peer can cause."""


class Duplicates:
    """Handles reports of duplicate cluster ids; logs each case once."""

    def __init__(
        self, discovery: Discovery, views: dict[str, PeerView], domains: Callable[[], list[Domain]]
    ) -> None:
        self._discovery = discovery
        self._views = views
        self._domains = domains
        self._reported = SeenCases(MAX_REPORTED)
        self._refused: str | None = None
        """Who was refused beside this engine."""
        discovery.on_refused = self._on_refused

    def on_session(self, view: PeerView) -> None:
        """An engine was met; another one with its cluster id may live."""
        self._tell_remote_peer(view)
        cluster = view.session.cluster_id
        for other in list(self._views.values()):
            if other is view or other.session.cluster_id != cluster or not is_live(other):
                continue
            if self._is_new(cluster, other.incarnation, view.incarnation):
                log.warning(
                    "cluster id %d names two live engines: %s, and %s; %s",
                    cluster, other.session.peer_and_program, view.session.peer_and_program, REMEDY,
                )  # fmt: skip

    def on_linked(self, domain: Domain) -> None:
        """A link is complete; an engine may have been refused beside one of its members."""
        members = domain.attempt.members.values() if domain.attempt else ()
        for member in members:
            engine = Address(member.cluster_id, member.incarnation)
            refused = self._discovery.claims.refused_beside(engine)
            if refused is not None:
                self._report_refused(member.cluster_id, refused.incarnation, str(refused))

    def on_replaced(self, pair: PairDomain, view: PeerView) -> None:
        """An engine asks for the place of a pair that works, with another engine of its cluster id."""
        earlier = self._views.get(pair.incarnation)
        if earlier is None or earlier is view or not is_live(earlier):
            return
        log.warning(
            "cluster id %d names two live engines: the link to %s is replaced by one to %s; %s",
            pair.cluster, earlier.session.peer_and_program, view.session.peer_and_program, REMEDY,
        )  # fmt: skip
        earlier.send(Duplicate(what="replaced", other=printable(view.session.peer_and_program)))
        view.send(Duplicate(what="took", other=printable(earlier.session.peer_and_program)))

    def on_report(self, view: PeerView, message: Duplicate) -> None:
        """A peer met a cluster id at two engines."""
        cluster, other = view.session.cluster_id, printable(message.other)
        view.told += 1
        if view.told > MAX_REPORTS_PER_PEER:
            return
        if message.what == "refused":
            self._warn_of_foreign(cluster, other)
            return
        log.warning(
            "cluster %d %s %s, which has the same cluster id %d; %s",
            cluster, REPORTED_ACTIONS[message.what], other, self._discovery.address.cluster_id, REMEDY,
        )  # fmt: skip

    def _on_refused(self, hello: Hello, pid: int | None) -> None:
        """An engine of our job and host may not link, since another one has its cluster id."""
        cluster, own = hello.cluster_id, self._discovery.address.cluster_id
        if cluster == own or any(cluster in domain.ranks for domain in self._domains()):
            who = described(pid, printable(hello.program))
            self._report_refused(cluster, hello.incarnation, who)
        # who links later finds it beside the holder's claim

    def _report_refused(self, cluster: int, incarnation: str, who: str) -> None:
        if not self._is_new(cluster, incarnation):
            return
        if cluster == self._discovery.address.cluster_id:
            self._on_refused_beside_us(who)
        else:
            self._warn_of_foreign(cluster, who)

    def _on_refused_beside_us(self, who: str) -> None:
        log.warning(
            "another engine with this engine's cluster id %d (%s) was refused its link; the engines "
            "linked with this one may belong to that one's job: %s",
            self._discovery.address.cluster_id, who, REMEDY,
        )  # fmt: skip
        self._refused = printable(who)
        for view in self._views.values():
            self._tell_remote_peer(view)

    def _tell_remote_peer(self, view: PeerView) -> None:
        """Tell an engine of another host about refusals, since it cannot see our runtime directory."""
        if self._refused is not None and view.session.address is not None:
            view.send(Duplicate(what="refused", other=self._refused))

    def _warn_of_foreign(self, cluster: int, who: str) -> None:
        log.warning(
            "a second engine with cluster id %d (%s) was refused its link; the first one, with which "
            "this engine links, may be the foreign one: %s",
            cluster, who, REMEDY,
        )  # fmt: skip

    def _is_new(self, cluster: int, *incarnations: str) -> bool:
        return self._reported.is_new((cluster, frozenset(incarnations)))


def is_live(view: PeerView) -> bool:
    """Whether a peer's process and session go on once everything that it has sent was handled."""
    view.session.drain()
    process = view.session.process
    if view.session.closed or process is None:
        return not view.session.closed
    return not has_ended(process.fd)

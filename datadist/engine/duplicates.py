"""Warnings where one cluster id names two live engines: ours may be linked with the foreign one.

Everything here runs on the reactor's thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from datadist.control.meeting import Meeting
from datadist.control.messages import Duplicate, Hello
from datadist.control.process import described
from datadist.control.runtime_dir import Address
from datadist.engine.domain import Domain, PairDomain
from datadist.engine.peers import PeerView

log = logging.getLogger("datadist.link")

REMEDY = (
    "if they belong to different jobs, set DATADIST_JOB to a name of its own for each job; else give "
    "every engine a cluster id of its own"
)
MAX_REPORTED = 256


class Duplicates:
    """What one engine hears of cluster ids that are used twice; each case is logged once."""

    def __init__(
        self, meeting: Meeting, views: dict[str, PeerView], domains: Callable[[], list[Domain]]
    ) -> None:
        self._meeting = meeting
        self._views = views
        self._domains = domains
        self._reported: set[tuple[int, frozenset[str]]] = set()
        meeting.on_refused = self._on_refused

    def on_session(self, view: PeerView) -> None:
        """An engine was met; another one with its cluster id may live."""
        cluster = view.session.cluster_id
        for other in list(self._views.values()):
            if other is view or other.session.cluster_id != cluster or not is_live(other):
                continue
            if self._is_new(cluster, other.incarnation, view.incarnation):
                log.warning(
                    "cluster id %d names two live engines: %s, and %s; %s",
                    cluster, other.session.who, view.session.who, REMEDY,
                )  # fmt: skip

    def on_linked(self, domain: Domain) -> None:
        """A link is complete; an engine may have been refused beside one of its members."""
        members = domain.attempt.members.values() if domain.attempt else ()
        for member in members:
            engine = Address(member.cluster_id, member.incarnation)
            refused = self._meeting.claims.contest(engine)
            if refused is not None:
                self._warn(member.cluster_id, refused.incarnation, str(refused))

    def on_replaced(self, pair: PairDomain, view: PeerView) -> None:
        """An engine asks for the place of a pair that works, with another engine of its cluster id."""
        earlier = self._views.get(pair.incarnation)
        if earlier is None or earlier is view or not is_live(earlier):
            return
        own, cluster = pair.own_cluster, pair.cluster
        log.warning(
            "cluster id %d names two live engines: the link to %s is replaced by one to %s; %s",
            cluster, earlier.session.who, view.session.who, REMEDY,
        )  # fmt: skip
        earlier.send(
            Duplicate(
                text=f"cluster {own} ended its link with this engine for one with {view.session.who}, "
                f"which has the same cluster id {cluster}; {REMEDY}"
            )
        )
        view.send(
            Duplicate(
                text=f"cluster {own} was linked with {earlier.session.who}, which has the same cluster "
                f"id {cluster} and lives: this engine took its place; {REMEDY}"
            )
        )

    def on_told(self, view: PeerView, message: Duplicate) -> None:
        """A peer met our cluster id at two engines."""
        log.warning("told by cluster %d: %s", view.session.cluster_id, message.text)

    def _on_refused(self, hello: Hello, pid: int | None) -> None:
        """An engine of our job may not link, since another one has its cluster id."""
        cluster = hello.cluster_id
        concerned = cluster == self._meeting.address.cluster_id or any(
            cluster in domain.ranks for domain in self._domains()
        )
        if concerned:
            self._warn(cluster, hello.incarnation, described(pid, hello.program))

    def _warn(self, cluster: int, incarnation: str, who: str) -> None:
        if not self._is_new(cluster, incarnation):
            return
        own = self._meeting.address.cluster_id
        if cluster == own:
            log.warning("another engine with this engine's cluster id %d (%s) was refused its link; the "
                        "engines linked with this one may belong to that one's job: %s",
                        cluster, who, REMEDY)  # fmt: skip
        else:
            log.warning("a second engine with cluster id %d (%s) was refused its link; the first one, "
                        "with which this engine links, may be the foreign one: %s",
                        cluster, who, REMEDY)  # fmt: skip

    def _is_new(self, cluster: int, *incarnations: str) -> bool:
        case = (cluster, frozenset(incarnations))
        if case in self._reported:
            return False
        if len(self._reported) >= MAX_REPORTED:
            self._reported.clear()
        self._reported.add(case)
        return True


def is_live(view: PeerView) -> bool:
    """Whether a peer's session goes on once everything that it has sent was handled."""
    view.session.drain()
    return not view.session.closed

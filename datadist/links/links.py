"""Forms communication domains: matches the announcements of their members.

Every rank announces its domain to every peer that it finds. Rank 0 of a domain decides. When it has
an announcement of the same domain from every other rank, it sends the members (`Form`). Then each
member builds its side (see :mod:`datadist.links.building`). If announcements can never match, both
ends fail with the difference. Everything here runs on the reactor's thread.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Collection
from functools import partial

from datadist.base.texts import in_seconds
from datadist.caches.peers import Announcement, DomainKey, PeerView, domain_key
from datadist.control.discovery import Discovery
from datadist.control.messages import Announce, Form, Member, Mismatch, Withdraw
from datadist.control.reactor import Reactor, Timer
from datadist.links import member_record
from datadist.links.building import Builder
from datadist.links.domain import Attempt, TableDomain, invalidate_routes
from datadist.links.duplicates import AFTER_SECONDS, Duplicates
from datadist.links.events import LinkEventKind
from datadist.links.matching import differences, disagreement, mutual
from datadist.links.missing_members import MissingMembers
from datadist.links.rendezvous import Rendezvous
from datadist.types import RegisterMemStatus

log = logging.getLogger("datadist.link")

RETRY_SECONDS = 0.2
"""Pause before a peer is sought again whose session broke."""
SHORT_SECONDS = 1.0
"""Pause before it is tried again to look for peers, when descriptors were short."""
SEARCH_SECONDS = 0.05
"""Pause before an engine is sought beside one that was met, which is nearly always the one meant."""
REJOIN_SECONDS = 0.5
"""Pause before members that a library brings together join again, after one of them left."""
WITHDRAW_SECONDS = 0.5
"""How long members of a domain that is OK are not told that it looks for nobody, which they know. A
message would make their first transfers wait until it has been handled."""
GRACE_SECONDS = 1.0
"""How long announcements that differ may wait for a better match before both fail."""


class Links:
    """The domains of one engine while they look for their members."""

    def __init__(
        self,
        reactor: Reactor,
        discovery: Discovery,
        views: dict[str, PeerView],
        builder: Builder,
        rendezvous: Rendezvous,
        waiting: MissingMembers,
        duplicates: Duplicates,
    ) -> None:
        self._reactor = reactor
        self._discovery = discovery
        self._views = views
        self._builder = builder
        self._rendezvous = rendezvous
        self.missing_members = waiting
        self._duplicates = duplicates
        self.domains: dict[int, TableDomain] = {}
        self._by_meaning: dict[DomainKey, list[TableDomain]] = {}
        self._comparing: Timer | None = None

    # -- from the API ------------------------------------------------------------------------

    def add(self, domain: TableDomain) -> None:
        """Begin to look for the members of a new domain."""
        double = domain.domain_key in self._by_meaning
        self.domains[domain.comm_id] = domain
        self._by_meaning.setdefault(domain.domain_key, []).append(domain)
        self._rendezvous.begin(domain)
        left = domain.deadline - time.monotonic()
        domain.expiry = self._reactor.later(left, lambda: self._expire(domain))
        self.missing_members.watch(domain)
        if domain.by_library and double:
            self._end(
                domain,
                "a domain of this name, mapping and rank table is held already, and the transport's "
                "library cannot tell two of them apart: unlink that first, or use another name",
            )
        elif domain.by_library:
            self._join(domain)
        self._search_members(domain)

    def _search_members(self, domain: TableDomain) -> None:
        others, met = domain.others, set()
        for view in list(self._views.values()):
            if view.session.cluster_id in others:
                met.add(view.session.cluster_id)
                self._announce(domain, view)
        self._consider(domain)
        for cluster in others:
            if cluster in met:  # another engine with its cluster id may have begun meanwhile
                self._reactor.later(SEARCH_SECONDS, partial(self._retry_contact, cluster))
            else:
                self._contact_again(cluster)
        self._compare_later()

    def _join(self, domain: TableDomain) -> None:
        """Let the transport's library bring the members together.

        Members are also searched on this host, but only to find differences of announcements.
        """

        def met(blobs: list[bytes]) -> tuple[str, dict[int, Member]]:
            token, members = member_record.read(domain, blobs)
            self._rendezvous.meet(domain, members)
            return token, members

        blob = member_record.make_record(
            domain, self._discovery.address, self._rendezvous.endpoints(domain)
        )
        self._builder.begin_by_library(domain, member_record.digest(domain), blob, met)

    def remove(self, domain: TableDomain) -> Attempt | None:
        """Take a domain out; the caller closes the attempt that is returned."""
        if self.domains.pop(domain.comm_id, None) is None:
            return None
        domain.look_now()
        self._by_meaning[domain.domain_key].remove(domain)
        if not self._by_meaning[domain.domain_key]:
            del self._by_meaning[domain.domain_key]
        domain.closed = True
        self._stop_waiting(domain)
        attempt = domain.attempt
        if attempt is not None:
            self._builder.leave(domain, attempt)
        domain.settled.set()
        return attempt

    # -- from peers --------------------------------------------------------------------------

    def on_session(self, view: PeerView) -> None:
        """A peer can be talked to: tell it what we wait for, and go on where it was missing."""
        for domain in list(self.domains.values()):
            if domain.waiting and view.session.cluster_id in domain.others:
                self._announce(domain, view)

    def on_lost(self, view: PeerView, orderly: bool) -> None:
        """A session ended; after an orderly end the peer may be there still."""
        for domain in list(self.domains.values()):
            domain.announced.discard(view.incarnation)
        delay = 0.0 if orderly else RETRY_SECONDS
        self._reactor.later(delay, lambda: self._retry_contact(view.session.cluster_id))

    def _retry_contact(self, cluster: int) -> None:
        if any(d.waiting and cluster in d.others for d in self.domains.values()):
            self._contact_again(cluster)

    def _contact_again(self, cluster: int) -> None:
        if not self._discovery.contact_cluster(cluster):
            self._reactor.later(SHORT_SECONDS, lambda: self._retry_contact(cluster))

    def on_announce(self, view: PeerView, message: Announce) -> None:
        """A peer waits for a domain. Raises :class:`~datadist.control.account.LimitExceeded`."""
        view.announcements.put(message)
        for domain in list(self._by_meaning.get(domain_key(message), ())):
            self._consider(domain)
            self._repeat_refusal(domain, view, message)
        self._compare_later()

    def _repeat_refusal(self, domain: TableDomain, view: PeerView, theirs: Announce) -> None:
        """Tell a peer that comes to a domain which failed because their settings differ."""
        if (
            domain.status is not RegisterMemStatus.FAILED
            or view.session.cluster_id not in domain.others
        ):
            return
        rank = domain.ranks[view.session.cluster_id]
        clusters = {r: c for c, r in domain.ranks.items()}
        why = disagreement({domain.rank: domain.announce, rank: theirs}, clusters)
        if why is not None:
            view.send(Mismatch(link=theirs.link, reason=why[:4000]))

    def on_mismatch(self, view: PeerView, message: Mismatch) -> None:
        """A member found that our domain can not match its own; others have no say in it."""
        domain = self.domains.get(message.link)
        if domain is not None and domain.waiting and view.session.cluster_id in domain.others:
            self.fail(domain, message.reason)

    def on_form(self, view: PeerView, form: Form) -> bool:
        """Rank 0 named the members of a domain of ours; False when no domain waits for that."""
        members = {member.rank: member for member in form.members}
        own = self._discovery.address.incarnation
        mine = next((m for m in form.members if m.incarnation == own), None)
        domain = self.domains.get(mine.link) if mine else None
        if (
            domain is None
            or not domain.waiting
            or {r: m.cluster_id for r, m in members.items()}
            != {r: c for c, r in domain.ranks.items()}
            or members[min(members)].incarnation != view.incarnation
            or members[min(members)].cluster_id != view.session.cluster_id
        ):
            return False
        self._builder.begin(domain, form.domain, members)
        self._rendezvous.meet(domain, members)
        return True

    # -- announcing --------------------------------------------------------------------------

    def _announce(self, domain: TableDomain, view: PeerView) -> None:
        if domain.waiting and view.incarnation not in domain.announced:
            domain.announced.add(view.incarnation)
            self._discovery.hold(view.session, domain)
            view.send(self._rendezvous.announcement(domain, view))

    def _stop_waiting(self, domain: TableDomain, but: Collection[str] = ()) -> None:
        for timer in (domain.expiry, domain.search_timer, domain.withdraw_timer):
            if timer is not None:
                timer.cancel()
        self._rendezvous.end(domain)
        self._withdraw(domain, but)

    def _withdraw(self, domain: TableDomain, but: Collection[str] = ()) -> None:
        """Tell those that heard of the domain that it looks for nobody; not the engines of ``but``."""
        told = sorted(domain.announced.difference(but))
        domain.announced.difference_update(told)
        for incarnation in told:
            view = self._views.get(incarnation)
            if view is not None:
                view.send(Withdraw(link=domain.comm_id))
                self._discovery.release(view.session, domain)  # may end the session, and call us

    # -- matching ----------------------------------------------------------------------------

    def _candidate(self, domain: TableDomain, cluster: int) -> tuple[PeerView, Announcement] | None:
        for view in self._views.values():
            if view.session.cluster_id != cluster:
                continue
            for link, announcement in view.announcements.with_key(domain.domain_key).items():
                if not self._builder.is_taken(view.incarnation, link):
                    return view, announcement
        return None

    def _consider(self, domain: TableDomain) -> None:
        """As rank 0: form the domain when everybody is there."""
        if not domain.waiting or domain.attempt or domain.by_library:
            return
        if domain.rank != min(domain.ranks.values()):
            return
        found: dict[int, tuple[PeerView, Announcement]] = {}
        for cluster, rank in domain.others.items():
            candidate = self._candidate(domain, cluster)
            if candidate is None:
                return
            found[rank] = candidate
        choices = {rank: a.message for rank, (_, a) in found.items()}
        why = disagreement(
            {**choices, domain.rank: domain.announce}, {r: c for c, r in domain.ranks.items()}
        )
        if why is not None:
            self.fail(domain, why)
        else:
            self._form(domain, found)

    def _form(self, domain: TableDomain, found: dict[int, tuple[PeerView, Announcement]]) -> None:
        own = self._discovery.address
        members = {
            domain.rank: Member(
                rank=domain.rank,
                cluster_id=own.cluster_id,
                incarnation=own.incarnation,
                link=domain.comm_id,
            )
        }
        for rank, (view, announcement) in found.items():
            members[rank] = Member(
                rank=rank,
                cluster_id=view.session.cluster_id,
                incarnation=view.incarnation,
                link=announcement.message.link,
                endpoints=announcement.message.endpoints,
            )
        form = Form(domain=secrets.token_hex(16), members=[members[r] for r in sorted(members)])
        for view, _ in found.values():
            view.send(form)
        self._builder.begin(domain, form.domain, members)

    def _compare_later(self) -> None:
        if self._comparing is None:
            self._comparing = self._reactor.later(GRACE_SECONDS, self._compare)

    def _compare(self) -> None:
        """Fail domains that have waited long enough for a peer with a different announcement of the
        same name.
        """
        self._comparing = None
        waiting = [d for d in self.domains.values() if d.searching]
        names = {domain.name for domain in waiting}
        strange: dict[str, list[tuple[PeerView, Announcement]]] = {}
        for view in self._views.values():
            for announcement in view.announcements:
                message = announcement.message
                if message.name in names and domain_key(message) not in self._by_meaning:
                    strange.setdefault(message.name, []).append((view, announcement))
        if not strange:
            return
        now = time.monotonic()
        young = False
        for domain in waiting:
            if now - domain.created < GRACE_SECONDS * 0.9:
                young = young or domain.name in strange
            else:
                young = self._compare_one(domain, strange.get(domain.name, []), now) or young
        if young:
            self._compare_later()

    def _compare_one(
        self, domain: TableDomain, strange: list[tuple[PeerView, Announcement]], now: float
    ) -> bool:
        """Compare a domain with announcements that match none of ours; returns whether one was too
        recent.
        """
        own, young = domain.own_cluster, False
        for view, announcement in strange:
            theirs, message = view.session.cluster_id, announcement.message
            if not mutual(domain.announce, own, message, theirs):
                continue
            if view.announcements.with_key(domain.domain_key):
                continue
            if now - announcement.at < GRACE_SECONDS * 0.9:
                young = True
                continue
            text = "ranks disagree: " + differences(domain.announce, own, message, theirs)
            view.send(Mismatch(link=message.link, reason=text[:4000]))
            self.fail(domain, text)
            return False
        return young

    # -- ends --------------------------------------------------------------------------------

    def on_ok(self, domain: TableDomain) -> None:
        """See :class:`~datadist.links.domain.Owner`."""
        attempt = domain.attempt
        assert attempt is not None
        domain.status = RegisterMemStatus.OK
        for member in attempt.members.values():
            view = self._views.get(member.incarnation)
            if view is not None:
                view.announcements.pop(member.link)
        members = {member.incarnation for member in attempt.members.values()}
        self._stop_waiting(domain, members)
        domain.withdraw_timer = self._reactor.later(
            WITHDRAW_SECONDS, lambda: self._withdraw(domain)
        )
        log.info(
            "%s: linked rank %d with %s", domain, domain.rank,
            ", ".join(f"cluster {c} (rank {r})" for c, r in domain.others.items()),
        )  # fmt: skip
        invalidate_routes(self._views, domain)
        domain.look_timer = self._reactor.later(
            AFTER_SECONDS, lambda: self._duplicates.on_linked(domain)
        )
        self._builder.note_ok(domain)
        domain.settled.set()

    def on_dissolved(self, domain: TableDomain) -> None:
        """See :class:`~datadist.links.domain.Owner`."""
        if domain.by_library:
            self._reactor.later(REJOIN_SECONDS, lambda: self._join_again(domain))
        self._consider(domain)

    def _join_again(self, domain: TableDomain) -> None:
        """The library knows the members by the domain's name: the earlier attempt has to be over."""
        if not domain.waiting or domain.attempt is not None:
            return
        if self._builder.is_closing(domain):
            self._reactor.later(REJOIN_SECONDS, lambda: self._join_again(domain))
        else:
            self._join(domain)

    def on_failed(self, domain: TableDomain, reason: str) -> None:
        """See :class:`~datadist.links.domain.Owner`."""
        self.fail(domain, reason)

    def on_member_gone(self, domain: TableDomain, unlinked: bool) -> None:
        """An OK domain stays until unlink, whoever leaves it."""

    def fail(self, domain: TableDomain, reason: str) -> None:
        """End the linking of a domain for good; peers that wait for it fail with it."""
        if not domain.waiting:
            return
        if domain.attempt is None:
            for view, link in self.missing_members.matching_announcements(domain):
                view.send(Mismatch(link=link, reason=reason[:4000]))
        self._end(domain, reason)

    def _expire(self, domain: TableDomain) -> None:
        """Fail a domain that ran out of time, naming who is missing; its peers wait on."""
        if domain.waiting:
            waited = domain.deadline - domain.created
            self._end(
                domain,
                f"not complete after {in_seconds(waited)}: {self.missing_members.missing(domain)}",
            )

    def _end(self, domain: TableDomain, reason: str) -> None:
        domain.status, domain.reason = RegisterMemStatus.FAILED, reason
        log.error("%s: FAILED: %s", domain, reason)
        self._builder.events.note(LinkEventKind.FAILED, domain, reason)
        if domain.attempt is not None:
            self._builder.fail(domain.attempt, reason)
            self._builder.drop(domain)
        self._stop_waiting(domain)
        domain.settled.set()

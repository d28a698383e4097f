"""Building a formed domain: attempts begin, go through their steps, and end.

Runs on the reactor; closing a link may take long and runs on workers. If a member leaves before it
was ready, the attempt is dissolved, and the domain waits for members again. An error of a transport
fails the domain on every rank. If the transport's library connects the members, they open and join
first, and establish sessions afterwards.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

from datadist.base.texts import in_seconds
from datadist.base.workers import Workers
from datadist.caches.memory import Memory
from datadist.caches.owned import OwnDirectory
from datadist.caches.peers import PeerView, do_nothing
from datadist.control.account import Item, LimitExceeded
from datadist.control.discovery import Discovery
from datadist.control.messages import (
    Dissolve,
    Fail,
    Left,
    Member,
    OfferMessage,
    Ready,
)
from datadist.control.reactor import Reactor
from datadist.control.runtime_dir import Address
from datadist.links.domain import Attempt, Domain
from datadist.links.events import LinkEventKind, LinkEvents
from datadist.links.in_flight import TransfersInFlight
from datadist.links.steps import Steps, answer, weight
from datadist.transport import Link, LinkError, Peer
from datadist.types import RegisterMemStatus

log = logging.getLogger("datadist.link")

MembersFromBlobs: TypeAlias = "Callable[[list[bytes]], tuple[str, dict[int, Member]]]"

EARLY_SECONDS = 10.0
MAX_EARLY = 64
CLOSE_SECONDS = 5.0
CONTACT_SECONDS = 15.0
"""Time for members that the transport's library connected to establish sessions."""
ACKS = "acknowledgements"
"""Holder of sessions on which a revocation is under way."""


class Builder:
    """Attempts by token; results are reported to the domain's owner."""

    def __init__(
        self,
        steps: Steps,
        reactor: Reactor,
        discovery: Discovery,
        workers: Workers,
        memory: Memory,
        owned: OwnDirectory,
    ) -> None:
        self._in_flight = TransfersInFlight(reactor, workers, memory.quarantine)
        self._steps = steps
        self.events = LinkEvents()
        """What the program is told of links."""
        steps.on_idle = self._close_when_idle
        self._reactor = reactor
        self._discovery = discovery
        self._workers = workers
        self._memory = memory
        self._owned = owned
        self._active: dict[str, Domain] = {}
        self._taken: set[tuple[str, int]] = set()
        """Incarnation and link id of every member of an attempt."""
        self._dropped: dict[Attempt, Domain] = {}
        """Given up, and not closed yet."""
        self._unclosed: set[Attempt] = set()
        self.writers: set[str] = set()
        """Incarnations of peers that were inside a write of our memory when a link was closed."""
        self.on_closed: Callable[[Attempt, frozenset[int]], None] = lambda _a, _r: None
        """Called for every closed link, with the ranks that may still write our memory."""
        self.on_unlinked: Callable[[], None] = do_nothing
        """Called soon after a link, or that to one of its members, has ended."""

    # -- beginning and ending an attempt -----------------------------------------------------

    def begin(self, domain: Domain, token: str, members: dict[int, Member]) -> None:
        """Start an attempt with these members, dropping an earlier one."""
        if domain.attempt is not None:
            self.drop(domain)
        attempt = domain.attempt = Attempt(token, domain.rank, sorted(members), members)
        self._unclosed.add(attempt)
        self._connect_members(domain, attempt)

    def begin_by_library(
        self, domain: Domain, name: str, blob: bytes, met: MembersFromBlobs
    ) -> None:
        """Start an attempt whose members the transport's library brings together.

        They join under ``name`` and swap blobs; ``met`` makes a token and the members of those, or
        raises ``ValueError``.
        """
        attempt = Attempt(secrets.token_hex(16), domain.rank, sorted(domain.ranks.values()), {})
        domain.attempt = attempt
        self._unclosed.add(attempt)
        self._active[attempt.token] = domain
        own = self._discovery.address.incarnation
        peers = {r: Peer(r, own if r == attempt.rank else "") for r in attempt.ranks}
        group = self._steps.group(domain, attempt, peers, name)

        def swap(link: Link) -> list[bytes] | LinkError:
            try:
                return link.exchange(blob)
            except LinkError as error:
                return error

        def swapped(found: list[bytes] | LinkError) -> None:
            if attempt.dead:
                return
            if isinstance(found, LinkError):  # all had joined: one of them has left
                self._dissolve(domain, f"a member left before the link was complete: {found}")
            else:
                self._introduce(domain, attempt, lambda: met(found))

        def opened(link: Link) -> None:
            attempt.link = link
            if not attempt.dead:
                self._steps.join(domain, attempt, lambda: swap(link), swapped)

        self._steps.open(domain, attempt, group, opened)

    def _introduce(
        self, domain: Domain, attempt: Attempt, met: Callable[[], tuple[str, dict[int, Member]]]
    ) -> None:
        try:
            token, attempt.members = met()
        except ValueError as error:
            self._steps.failed(domain, attempt, str(error))
            return
        del self._active[attempt.token]
        attempt.token = token
        self._connect_members(domain, attempt)
        self._reactor.later(CONTACT_SECONDS, lambda: self._check_contact(domain, attempt))

    def _connect_members(self, domain: Domain, attempt: Attempt) -> None:
        """Go on with an attempt whose members are known now."""
        self._active[attempt.token] = domain
        self._taken |= attempt.taken
        for rank in attempt.others:
            view = self._steps.view(attempt, rank)
            if view is None:
                member = attempt.members[rank]
                self._discovery.contact(Address(member.cluster_id, member.incarnation))
            else:
                self._adopt(attempt, view)
        self._steps.advance(domain, attempt)

    def _check_contact(self, domain: Domain, attempt: Attempt) -> None:
        """Dissolve the attempt if a member left after joining and before it had a session with us."""
        absent = [rank for rank in attempt.others if self._steps.view(attempt, rank) is None]
        if absent and not attempt.dead and domain.waiting:
            who = ", ".join(f"cluster {attempt.members[r].cluster_id} (rank {r})" for r in absent)
            self._dissolve(
                domain, f"no contact with {who} within {in_seconds(CONTACT_SECONDS)} of joining"
            )

    def check_room(self, view: PeerView) -> None:
        """Raise LimitExceeded for a peer that has begun many links which are not closed yet."""
        ending = [a for a in list(self._dropped) if a.rank_of(view.incarnation) is not None]
        view.account.check(Item.ENDING, len(ending))

    def is_taken(self, incarnation: str, link: int) -> bool:
        """Whether an announcement is part of one of our attempts."""
        return (incarnation, link) in self._taken

    def knows(self, token: str) -> bool:
        """Whether an attempt has that token, also one that is not closed yet."""
        return any(attempt.token == token for attempt in list(self._unclosed))

    def reaches(self, incarnation: str) -> bool:
        """Whether a link to that engine was opened and is not closed yet."""
        return any(
            attempt.link is not None and attempt.rank_of(incarnation) is not None
            for attempt in list(self._unclosed)
        )

    def is_writing(self, incarnation: str) -> bool:
        """Whether this process itself still writes bytes of an engine that has ended into our memory."""
        attempts = [(each, each.rank_of(incarnation)) for each in list(self._unclosed)]
        return any(each.abort([rank]) for each, rank in attempts if rank is not None)

    def _adopt(self, attempt: Attempt, view: PeerView) -> None:
        self._discovery.hold(view.session, attempt)
        early = view.early.pop(attempt.token, None)
        if early is not None:
            rank = attempt.rank_of(view.incarnation)
            assert rank is not None
            attempt.offers[rank] = early

    def drop(self, domain: Domain) -> None:
        """Give up the attempt of a domain; its link is closed by a worker.

        A member that knows that we are ready may read our memory: it must confirm that it has
        stopped.
        """
        attempt = domain.attempt
        if attempt is None:
            return
        if attempt.told_ready:
            self.leave(domain, attempt)
        else:
            self._retire(domain, attempt)
        attempt.dropped = True
        self._dropped[attempt] = domain
        attempt.abort(attempt.others)
        self._close_when_idle(attempt)

    def leave(self, domain: Domain, attempt: Attempt) -> dict[PeerView, int]:
        """Tell the members that we unlink; the caller shuts the attempt down itself.

        Returns what each member acknowledges once it is done with the domain.
        """
        targets = {}
        for rank in attempt.others:
            view = self._steps.view(attempt, rank)
            if view is not None:  # also one that has left: a pull of its own may still go on
                self._discovery.hold(view.session, ACKS)
                self._owned.publication.send_revocation(
                    view, lambda seq: Left(domain=attempt.token, seq=seq)
                )
                targets[view] = view.seq_sent
        self._retire(domain, attempt, targets)
        return targets

    def fail(self, attempt: Attempt, reason: str) -> None:
        """Tell the members that the attempt failed for good."""
        self._steps.tell(attempt, Fail(domain=attempt.token, reason=reason[:4000]))

    def _retire(
        self, domain: Domain, attempt: Attempt, told: Mapping[PeerView, int] | None = None
    ) -> None:
        """Publish our caches to members in ``told`` until their pulls have ended."""
        attempt.dead = True
        self._reactor.post(self.on_unlinked)
        domain.attempt = None
        self._active.pop(attempt.token, None)
        self._taken -= attempt.taken
        for _, fds in attempt.offers.values():
            self._reactor.closer.discard(fds)
        for rank in attempt.others:
            view = self._steps.view(attempt, rank)
            if view is not None:
                if rank in attempt.offers:
                    answer(view, attempt.offers[rank][0])
                seq = {view: told[view]} if told and view in told else {}
                self._owned.revocations.when_acked(seq, partial(self._unsubscribe, view))
        attempt.offers.clear()

    def _unsubscribe(self, view: PeerView) -> None:
        linked = any(
            domain.attempt is not None and domain.attempt.rank_of(view.incarnation) is not None
            for domain in list(self._active.values())
        )
        self._owned.publication.unsubscribe_unless(view, linked)

    def _close_when_idle(self, attempt: Attempt) -> None:
        if attempt.closing or (attempt.jobs and not attempt.joining):
            return
        attempt.closing = True
        self._workers.submit(lambda: self.close(attempt, 0.0), attempt.owner)

    def close(self, attempt: Attempt, grace_seconds: float) -> None:
        """Shut an attempt down that was left or dropped; not on the reactor."""
        try:
            possible_writers = attempt.shut_down(
                grace_seconds, CLOSE_SECONDS, lambda: self._begin_to_close(attempt)
            )
        finally:
            attempt.processes.clear()
            self._dropped.pop(attempt, None)
            self._unclosed.discard(attempt)
            self._reactor.post(lambda: self._release(attempt))
            if attempt.idle.is_set():  # else when that job has ended
                self._steps.give_back(attempt)
        self.writers |= {attempt.members[rank].incarnation for rank in possible_writers}
        self.on_closed(attempt, possible_writers)
        if possible_writers:
            log.warning(
                "%s may still write our memory; what it could write is kept until it answers",
                ", ".join(f"rank {rank}" for rank in sorted(possible_writers)),
            )

    def _begin_to_close(self, attempt: Attempt) -> None:
        """Nothing is in flight within calls; what else the link is told ends before it is closed."""
        self._memory.forget_link(attempt)
        self._in_flight.end_all(attempt)

    def _release(self, attempt: Attempt) -> None:
        """Release the sessions of the members; until then a running pull still receives their
        messages.
        """
        for rank in attempt.others:
            view = self._steps.view(attempt, rank)
            if view is not None:
                self._discovery.release(view.session, attempt)

    def abort_transfers(self) -> None:
        """Abort transfers that closing attempts still wait for (finalize)."""
        for attempt in list(self._unclosed):
            if attempt.dead and not attempt.transfers_aborted:
                attempt.transfers_aborted = True
                attempt.abort(attempt.others)

    def is_closing(self, domain: Domain) -> bool:
        """Whether an attempt of the domain was given up and is not closed yet."""
        return domain in list(self._dropped.values())

    def wait_for_dropped(self, timeout: float, domain: Domain | None = None) -> None:
        """Let the links that were given up (those of ``domain``) be closed, within ``timeout`` s."""

        def closed() -> bool:
            left = list(self._dropped.values())
            return not left or (domain is not None and domain not in left)

        self._reactor.wait_until(closed, timeout)  # who closes one posts what follows

    # -- from peers --------------------------------------------------------------------------

    def refuse(self, view: PeerView, token: str, reason: str) -> None:
        """Tell the sender of a `Form` that it can not be."""
        view.send(Dissolve(domain=token, reason=reason))

    def on_session(self, view: PeerView) -> None:
        """A member that an attempt waited for can be talked to."""
        for domain in list(self._active.values()):
            attempt = domain.attempt
            if attempt is not None and attempt.rank_of(view.incarnation) is not None:
                self._adopt(attempt, view)
                self._steps.advance(domain, attempt)

    def on_offer(self, view: PeerView, message: OfferMessage, fds: list[int]) -> None:
        """A member's offer; it may come before we heard of the domain.

        Raises :class:`~datadist.control.account.LimitExceeded`.
        """
        try:
            view.account.take(Item.OFFERS)
            view.account.take(Item.OFFER_BYTES, weight(message))
        except LimitExceeded:
            self._reactor.closer.discard(fds)
            raise
        domain = self._active.get(message.domain)
        attempt = domain.attempt if domain else None
        rank = attempt.rank_of(view.incarnation) if attempt else None
        if domain is None or attempt is None:
            self._keep_early(view, message, fds)
        elif rank is None or rank in attempt.offers or rank in attempt.attaching:
            self._reactor.closer.discard(fds)
            answer(view, message)
        else:
            attempt.offers[rank] = (message, fds)
            self._steps.advance(domain, attempt)

    def _keep_early(self, view: PeerView, message: OfferMessage, fds: list[int]) -> None:
        token = message.domain
        if token in view.early or len(view.early) >= MAX_EARLY:
            self._reactor.closer.discard(fds)
            answer(view, message)
            return
        view.early[token] = (message, fds)

        def forget() -> None:
            late = view.early.pop(token, None)
            if late is not None:
                self._reactor.closer.discard(late[1])
                answer(view, late[0])

        self._reactor.later(EARLY_SECONDS, forget)

    def on_ready(self, view: PeerView, message: Ready) -> None:
        """A member has attached everybody."""
        if message.attached:
            view.offer_taken()
        domain = self._active.get(message.domain)
        attempt = domain.attempt if domain else None
        if domain is not None and attempt is not None:
            rank = attempt.rank_of(view.incarnation)
            if rank is not None:
                attempt.metadata[rank] = message.metadata
                attempt.ready.add(rank)
                self._steps.check_ok(domain, attempt)

    def give_metadata(self, domain: Domain, metadata: bytes) -> None:
        """Give the peers of a domain these bytes, also where they have had others."""
        attempt, known = domain.attempt, domain.metadata == metadata
        domain.metadata = metadata
        if attempt is not None and attempt.told_ready and not attempt.dead and not known:
            self._steps.tell_metadata(domain, attempt)

    def on_fail(self, view: PeerView, message: Fail) -> None:
        """A member failed: so do we."""
        self._on_end(view, message.domain, message.reason, final=True)

    def on_dissolve(self, view: PeerView, message: Dissolve) -> None:
        """A member went back to waiting: so do we."""
        self._on_end(view, message.domain, message.reason, final=False)

    def _on_end(self, view: PeerView, token: str, reason: str, final: bool) -> None:
        domain = self._active.get(token)
        if domain is None or domain.attempt is None:
            return
        if domain.attempt.rank_of(view.incarnation) is None:
            return
        cluster = view.session.cluster_id
        if not domain.waiting:  # it dissolved when we had just seen all members ready
            self._member_gone(domain, view, f"cluster {cluster} gave up: {reason}", logging.WARNING)
        elif final:
            domain.owner.on_failed(domain, f"cluster {cluster} reported: {reason}")
        else:
            self._dissolve(domain, reason)

    def on_left(self, view: PeerView, message: Left) -> None:
        """A member unlinked."""
        domain = self._active.get(message.domain)
        if domain is not None:
            cluster = view.session.cluster_id
            self._member_gone(domain, view, f"cluster {cluster} has unlinked", logging.DEBUG, True)
        view.acknowledge(message.seq)

    def on_lost(self, view: PeerView, reason: str, orderly: bool) -> None:
        """A member's process is gone, or closed its session in an orderly way."""
        level = logging.INFO if orderly else logging.WARNING
        for domain in list(self._active.values()):
            attempt = domain.attempt
            if attempt is not None and attempt.rank_of(view.incarnation) is not None:
                cluster = view.session.cluster_id
                self._member_gone(domain, view, f"cluster {cluster} is gone: {reason}", level)
        for _, fds in view.early.values():
            self._reactor.closer.discard(fds)
        view.early.clear()
        self._steps.connections.on_lost(view.incarnation)

    def _member_gone(
        self, domain: Domain, view: PeerView, reason: str, level: int, unlinked: bool = False
    ) -> None:
        attempt = domain.attempt
        assert attempt is not None
        rank = attempt.rank_of(view.incarnation)
        if rank is None:
            return
        if domain.waiting and not (attempt.told_ready and rank in attempt.ready):
            self._dissolve(domain, reason)
            return
        known = rank in attempt.gone
        if not known and (unlinked or level == logging.INFO):
            attempt.orderly.add(rank)
        attempt.gone.setdefault(rank, reason)
        self._reactor.post(self.on_unlinked)
        attempt.abort([rank])
        if domain.status is RegisterMemStatus.OK:
            log.log(level, "%s: %s", domain, reason)
            if not known:
                self._note_gone(domain, attempt, rank)
        domain.owner.on_member_gone(domain, unlinked)

    def note_ok(self, domain: Domain) -> None:
        """The events of a domain that is OK now; members that were ready may be gone already."""
        self.events.note(LinkEventKind.OK, domain)
        attempt = domain.attempt
        assert attempt is not None
        for rank in list(attempt.gone):
            self._note_gone(domain, attempt, rank)

    def _note_gone(self, domain: Domain, attempt: Attempt, rank: int) -> None:
        kind = LinkEventKind.GONE if rank in attempt.orderly else LinkEventKind.BROKEN
        self.events.note(kind, domain, attempt.gone[rank], attempt.members[rank].cluster_id)

    def _dissolve(self, domain: Domain, reason: str) -> None:
        attempt = domain.attempt
        assert attempt is not None
        log.info("%s: waiting again: %s", domain, reason)
        domain.last_failure = reason
        self._steps.tell(attempt, Dissolve(domain=attempt.token, reason=reason[:4000]))
        self.drop(domain)
        domain.owner.on_dissolved(domain)

"""The steps of an attempt: open the transport's link, swap offers, attach, join, agree on readiness.

They follow each other on the reactor; those that may take long run on workers. Every step looks
first whether the attempt was given up meanwhile, and tells the domain's owner of what went wrong.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from datadist.base.flag import Flag
from datadist.base.shortage import explain
from datadist.base.threads import start
from datadist.base.workers import Workers
from datadist.caches.memory import Memory
from datadist.caches.owned import OwnDirectory
from datadist.caches.peers import PeerView
from datadist.control.account import Item
from datadist.control.discovery import Discovery
from datadist.control.messages import Attached, Message, OfferMessage, Ready
from datadist.control.reactor import Reactor
from datadist.control.session import Session, close_all
from datadist.links.domain import Attempt, Domain
from datadist.links.peer_connections import PeerConnections
from datadist.transport import Access, Group, Link, Offer, Peer, Region, Transport
from datadist.transports.defects import text_of

Joined = TypeVar("Joined")
log = logging.getLogger("datadist.link")

REGION_BYTES = 40
"""Of the id of a region in an offer."""
FEW_REGIONS = 512
"""A transport goes through so many, and a link hears of them, in some hundred microseconds."""


class Steps:
    """What the attempts of one engine go through."""

    def __init__(
        self,
        reactor: Reactor,
        discovery: Discovery,
        views: dict[str, PeerView],
        workers: Workers,
        transport: Transport,
        memory: Memory,
        owned: OwnDirectory,
        access: Access,
        connections: PeerConnections,
    ) -> None:
        self.connections = connections
        self._reactor = reactor
        self._discovery = discovery
        self._views = views
        self._workers = workers
        self._transport = transport
        self._memory = memory
        self._owned = owned
        self._access = access
        self.on_idle: Callable[[Attempt], None] = lambda _attempt: None
        """Called when a job of a dropped attempt has ended."""

    def view(self, attempt: Attempt, rank: int) -> PeerView | None:
        """A member that is known and can be talked to."""
        member = attempt.members.get(rank)
        return None if member is None else self._views.get(member.incarnation)

    def tell(self, attempt: Attempt, message: Message) -> None:
        """Send ``message`` to every member that is still there."""
        for rank in attempt.others:
            view = self.view(attempt, rank)
            if view is not None:
                view.send(message)

    def advance(self, domain: Domain, attempt: Attempt) -> None:
        """Take every step that can be taken now."""
        if attempt.dead:
            return
        if not attempt.opening:
            self._try_open(domain, attempt)  # and what follows, once it is open
            return
        if attempt.link is None or attempt.joining:
            return
        self._send_offer_and_directory(domain, attempt)
        for rank in [r for r in attempt.offers if r not in attempt.attaching]:
            if rank in attempt.offers:  # still: one that fails ends the attempt
                self._attach(domain, attempt, rank)
        if attempt.attached.issuperset(attempt.others) and not attempt.told_ready:
            if self._transport.capabilities.self_bootstrapping and not attempt.joined:
                self.join(
                    domain, attempt, lambda: None, lambda _: self._tell_ready(domain, attempt)
                )
            else:
                self._tell_ready(domain, attempt)
        self._answer_offers(attempt)

    def _answer_offers(self, attempt: Attempt) -> None:
        """Acknowledge what was attached and the message that we are ready did not acknowledge."""
        while attempt.unanswered:
            view = self.view(attempt, attempt.unanswered.pop())
            if view is not None:
                view.send_soon(Attached(domain=attempt.token))

    def _send_offer_and_directory(self, domain: Domain, attempt: Attempt) -> None:
        """Give our offer and our directory to the members that can be talked to.

        They go together, the offer first, since more has to be done with it; the directory is there
        before anybody hears that we are ready.
        """
        for rank in attempt.others:
            view = self.view(attempt, rank)
            if view is not None and rank not in attempt.offers_prepared and not attempt.dead:
                attempt.offers_prepared.add(rank)
                view.queue_offer(self._offer_sender(domain, attempt, rank))
                if not attempt.dead:
                    self._owned.publication.subscribe(view)

    def _try_open(self, domain: Domain, attempt: Attempt) -> None:
        views = {r: self._views.get(attempt.members[r].incarnation) for r in attempt.others}
        present = {rank: view for rank, view in views.items() if view is not None}
        if len(present) < len(views):
            return
        peers = {attempt.rank: Peer(attempt.rank, self._discovery.address.incarnation)}
        for rank, view in present.items():
            session = view.session
            pidfd = None if session.process is None else session.process.fd
            peers[rank] = Peer(
                rank, view.incarnation, session.peer_pid, pidfd, session.address, session.control_fd
            )

        def opened(link: Link) -> None:
            attempt.link = link
            self.advance(domain, attempt)

        group = self.group(domain, attempt, peers, attempt.token)
        for view in present.values():
            if view.session.process is not None:
                attempt.processes.append(view.session.process)
        self.open(domain, attempt, group, opened)

    def open(
        self, domain: Domain, attempt: Attempt, group: Group, opened: Callable[[Link], None]
    ) -> None:
        """Let the transport open its link over all our memory."""
        attempt.opening = True
        exposed = self._memory.expose(attempt)
        attempt.regions = sorted(exposed)

        def finished(link: Link) -> None:
            if attempt.closed:  # without this link, which took too long: see `_end_late`
                attempt.link = link
            else:
                opened(link)

        def tell(link: Link) -> None:
            try:
                told = self._memory.tell_link_at_once(attempt, link)
            except Exception:  # then a worker tries that again, and reports it
                told = False
            if told:
                finished(link)
            else:
                self._job(domain, attempt, stage, lambda: self._complete(attempt, link), finished)

        stage, regions = "opening the transport", list(exposed.values())
        if self._transport.capabilities.opens_at_once and len(regions) <= FEW_REGIONS:
            self._job(
                domain, attempt, stage, lambda: self._open(attempt, group, regions), tell,
                at_once=True,
            )  # fmt: skip
        else:
            self._job(
                domain, attempt, stage,
                lambda: self._complete(attempt, self._open(attempt, group, regions)), finished,
            )  # fmt: skip

    def _open(self, attempt: Attempt, group: Group, regions: list[Region]) -> Link:
        connected = self.connections.connect(attempt, group)
        link = self._transport.open(connected, regions, self._access)
        try:
            attempt.learn(link, self._transport.capabilities)
        except BaseException:
            link.close()
            raise
        return link

    def _complete(self, attempt: Attempt, link: Link) -> Link:
        """Tell a link what was registered since it was asked for; not on the control thread."""
        try:
            self._memory.tell_link(attempt, link)
        except BaseException:
            link.close()
            raise
        return link

    def _end_late(self, attempt: Attempt) -> None:
        """What closing the attempt did not wait for: its link may have come just then, or after it."""
        link = attempt.link
        try:
            if link is not None:
                link.close()
        except Exception as error:
            log.error("closing a link that took too long to open failed: %s", text_of(error, link))
        finally:
            self.give_back(attempt)

    def give_back(self, attempt: Attempt) -> None:
        """What a link has used, which is closed: connections, and the exposure of our memory."""
        self.connections.disconnect(attempt)
        regions, attempt.regions = attempt.regions, []
        self._memory.conceal(regions, attempt)

    @staticmethod
    def group(domain: Domain, attempt: Attempt, peers: dict[int, Peer], suffix: str) -> Group:
        """The group that the transport is told of."""
        return Group(
            name=f"{domain.name.encode()[:90].decode(errors='ignore')}.{suffix}",
            rank=attempt.rank,
            peers=dict(sorted(peers.items())),
            table=domain.table,
            deadline=domain.deadline,
        )

    def _offer_sender(self, domain: Domain, attempt: Attempt, rank: int) -> Callable[[], bool]:
        def give() -> bool:
            view = self.view(attempt, rank)
            if attempt.dead or attempt.link is None or view is None:
                return False
            try:
                offer = attempt.link.offer(rank)
                why = _offer_problem(offer, rank, view.session)
            except Exception as error:
                self.failed(
                    domain, attempt, self._blame(f"making the offer for rank {rank}", error)
                )
                return False
            if why is not None:
                close_all(offer.fds)
                self.failed(domain, attempt, why)
                return False
            message = OfferMessage(
                domain=attempt.token, data=bytes(offer.data), fds=len(offer.fds),
                regions=attempt.regions,
            )  # fmt: skip
            try:
                view.session.send_soon(message, offer.fds)
            except ValueError as error:
                many = f"the offer for rank {rank} of {len(attempt.regions)} regions: {error}"
                self.failed(domain, attempt, f"{many}; register fewer tensors")
                return False
            return True

        return give

    def _attach(self, domain: Domain, attempt: Attempt, rank: int) -> None:
        message, fds = attempt.offers.pop(rank)
        attempt.attaching.add(rank)
        link = attempt.link
        assert link is not None

        offer = Offer(message.data, fds)

        def take() -> None:
            try:
                link.attach(rank, offer)
            finally:
                self._reactor.post(tell_peer)

        def tell_peer() -> None:
            view = self.view(attempt, rank)
            if view is not None:
                answer(view, message)

        def note() -> None:
            attempt.attached.add(rank)
            attempt.exposed[rank] = frozenset(message.regions)

        def attached(_: None) -> None:
            if not attempt.dead:
                note()
                self.advance(domain, attempt)

        stage = f"attaching the memory of rank {rank}"
        try:
            done = link.attach_at_once(rank, offer)
        except Exception as error:  # which it must not
            tell_peer()
            self.failed(domain, attempt, self._blame(stage, error))
            return
        if done:  # what follows is up to our caller, which takes all steps that can be taken
            view = self.view(attempt, rank)
            if view is not None:
                release_offer(view, message)
                attempt.unanswered.add(rank)
            note()
        else:
            self._job(
                domain, attempt, stage, take, attached, owner=attempt.members[rank].incarnation
            )

    def join(
        self,
        domain: Domain,
        attempt: Attempt,
        then: Callable[[], Joined],
        done: Callable[[Joined], None],
    ) -> None:
        """Meet the members in the transport's library, and do what comes next on that thread."""
        link = attempt.link
        assert link is not None
        attempt.joining = True

        def join() -> Joined:
            link.join(max(0.0, domain.deadline - time.monotonic()))
            return then()

        def joined(result: Joined) -> None:
            attempt.joining, attempt.joined = False, True
            done(result)

        self._job(
            domain, attempt, "joining the peers in the transport's library", join, joined,
            own_thread=True,
        )  # fmt: skip

    def _tell_ready(self, domain: Domain, attempt: Attempt) -> None:
        if not attempt.dead:
            attempt.told_ready = True
            self.tell_metadata(domain, attempt)
            self.check_ok(domain, attempt)

    def tell_metadata(self, domain: Domain, attempt: Attempt) -> None:
        """Tell the members that we are ready, and what our program gives them.

        This is on its way before we are OK: a member that hears what was sent to it is OK as well.
        """
        for rank in attempt.others:
            view, attached = self.view(attempt, rank), rank in attempt.unanswered
            attempt.unanswered.discard(rank)
            if view is not None:
                view.send(Ready(domain=attempt.token, metadata=domain.metadata, attached=attached))

    def check_ok(self, domain: Domain, attempt: Attempt) -> None:
        """OK once every member has said that it is ready."""
        if domain.waiting and attempt.told_ready and attempt.ready.issuperset(attempt.others):
            domain.owner.on_ok(domain)

    def _job(
        self,
        domain: Domain,
        attempt: Attempt,
        stage: str,
        work: Callable[[], object],
        done: Callable[..., None],
        own_thread: bool = False,
        owner: str | None = None,
        at_once: bool = False,
    ) -> None:
        """Do some work, then what follows from its result: on a worker, on a thread, or here and now.

        What fails ends the domain, so that comes in a turn of its own: who called may be in the middle
        of beginning it.
        """
        if attempt.jobs == 0:
            attempt.idle = Flag()
        attempt.jobs += 1

        def run() -> None:
            try:
                result = work()
            except BaseException as error:
                reason = self._blame(stage, error)
                self._reactor.post(lambda: finish(lambda: self.failed(domain, attempt, reason)))
            else:
                if at_once:
                    go_on(result)
                else:
                    self._reactor.post(lambda: finish(lambda: done(result)))

        def go_on(result: object) -> None:
            try:
                finish(lambda: done(result))
            except Exception as error:  # else it would end the session that we handle a message of
                log.exception("unexpected error after %s; please report it", stage)
                reason = self._blame(stage, error)
                self._reactor.post(lambda: self.failed(domain, attempt, reason))

        def finish(then: Callable[[], None]) -> None:
            try:
                then()
            finally:
                attempt.jobs -= 1
                if attempt.jobs == 0:
                    attempt.idle.set()
                    if attempt.closed:
                        self._workers.submit(lambda: self._end_late(attempt), attempt.owner)
                if attempt.dropped:
                    self.on_idle(attempt)

        def run_on_own_thread() -> None:
            try:
                start(threading.Thread(target=run, name="datadist-join", daemon=True))
            except RuntimeError as error:
                reason = f"{stage} failed: {explain(error)}"
                self._reactor.post(lambda: finish(lambda: self.failed(domain, attempt, reason)))

        if at_once:
            run()
        else:
            self._workers.submit(run_on_own_thread if own_thread else run, owner or attempt.owner)

    def failed(self, domain: Domain, attempt: Attempt, reason: str) -> None:
        """The domain fails, unless the attempt was given up."""
        if not attempt.dead:
            domain.owner.on_failed(domain, reason)

    def _blame(self, stage: str, error: BaseException) -> str:
        return f"{stage} failed: {text_of(error, self._transport)}"


def _offer_problem(offer: Offer, rank: int, session: Session) -> str | None:
    """Why an offer cannot be sent."""
    if not isinstance(offer.data, (bytes, bytearray, memoryview)):
        kind = type(offer.data).__name__
        return f"the transport's offer for rank {rank} is of type {kind}, not bytes"
    size, count = len(offer.data), len(offer.fds)
    if size > Offer.MAX_DATA:
        return f"the transport's offer for rank {rank} has {size} bytes, over {Offer.MAX_DATA}"
    if count > Offer.MAX_FDS:
        return (
            f"the transport's offer for rank {rank} has {count} descriptors, over {Offer.MAX_FDS}"
        )
    if count and not session.takes_descriptors:
        return (
            "the transport offers descriptors, which cannot leave the host, to rank "
            f"{rank} at {session.address}"
        )
    return None


def weight(message: OfferMessage) -> int:
    """About how many bytes an offer takes here."""
    return len(message.data) + REGION_BYTES * len(message.regions)


def answer(view: PeerView, message: OfferMessage) -> None:
    """Acknowledge an offer of a peer, once for each offer."""
    release_offer(view, message)
    view.send_soon(Attached(domain=message.domain))


def release_offer(view: PeerView, message: OfferMessage) -> None:
    """Count an offer of a peer as taken."""
    view.account.give_back(Item.OFFERS)
    view.account.give_back(Item.OFFER_BYTES, weight(message))

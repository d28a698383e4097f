"""Links of two engines by address (`link_clusters`): asking, answering, and their end.

The caller finds the listener's engine and asks it (`Dial`); whoever is asked names the members
(`Form`), and both build the link as that of a domain (see :mod:`datadist.links.building`). If two
ask each other at once, the one with the smaller incarnation answers. Everything here runs on the
reactor's thread but what says otherwise.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from datadist.base.flag import Flag
from datadist.base.picklable import PicklableError
from datadist.caches.peers import PeerView
from datadist.control.discovery import Discovery, EndpointError
from datadist.control.hostport import HostPort
from datadist.control.messages import Dial, Form, Member, Refused, seconds_until
from datadist.control.reactor import Reactor, Timer
from datadist.control.runtime_dir import Address
from datadist.links.building import Builder
from datadist.links.domain import Attempt, PairDomain, invalidate_routes
from datadist.links.duplicates import AFTER_SECONDS, Duplicates
from datadist.links.events import LinkEventKind
from datadist.links.rendezvous import NO_KEY
from datadist.status import LLMStatusCode, code_of
from datadist.types import RegisterMemStatus

log = logging.getLogger("datadist.link")


class DialError(PicklableError):
    """A call of `link_clusters` that is decided before there is a pair."""

    def __init__(self, code: LLMStatusCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(eq=False)
class Call:
    """One address of `link_clusters`; once ``met`` is set there is a pair, or an error."""

    place: HostPort
    deadline: float
    began: float = field(default_factory=time.monotonic)
    met: Flag = field(default_factory=Flag)
    pair: PairDomain | None = None
    error: DialError | None = None
    metadata: bytes | None = None
    """What the peer is given; None: what all peers are."""
    asks: bool = False
    """Whether only who listens there is asked; then ``found`` is the answer."""
    found: Address | None = None
    forgotten: bool = False
    """Whether the caller was interrupted, and never heard what came of it."""

    def refuse(self, code: LLMStatusCode, reason: str) -> None:
        """There will be no pair."""
        self.error = DialError(code, reason)
        self.met.set()


class Clusters:
    """The pairs of one engine by cluster id."""

    def __init__(
        self,
        reactor: Reactor,
        discovery: Discovery,
        views: dict[str, PeerView],
        builder: Builder,
        backend: str,
        one_sided: bool,
        far: bool,
        duplicates: Duplicates,
        longest: float,
        metadata: bytes = b"",
    ) -> None:
        self._reactor = reactor
        self._discovery = discovery
        self._views = views
        self._builder = builder
        self._backend = backend
        self._one_sided = one_sided
        self._far = far
        self._duplicates = duplicates
        self._longest = longest
        """Seconds that a peer may have us wait for it."""
        self._metadata = metadata
        """What peers are given where the caller says nothing else, or has not linked himself."""
        self.pairs: dict[int, PairDomain] = {}
        self._calls: dict[Call, Timer] = {}
        """Calls without an answer from the network yet."""
        self._ended = False

    # -- asking ------------------------------------------------------------------------------

    def dial(self, call: Call) -> None:
        """Link with the engine that listens there: on this host, else over the network."""
        ip, port = call.place.host, call.place.port
        seconds = max(0.0, call.deadline - time.monotonic())
        try:
            address = self._discovery.find(ip, port)
        except EndpointError as error:
            call.refuse(LLMStatusCode.LLM_LINK_FAILED, str(error))
            return
        if address is not None:
            self._on_met(call, address, None)
        elif self._discovery.remote is not None:
            self._calls[call] = self._reactor.later(seconds, lambda: self._too_late(call))
            self._discovery.remote.expect(call, [ip])
            self._discovery.remote.contact(
                call.place, None, lambda met: self._on_reached(call, met), seconds
            )
        else:
            where = f" on this host; {NO_KEY}" if self._far else ""
            why = f"nobody listens at {call.place}{where}{self._discovery.hint(port)}"
            call.refuse(LLMStatusCode.LLM_LINK_FAILED, why)

    def forget(self, calls: Sequence[Call]) -> None:
        """Their caller was interrupted: its next `link_clusters` may have their pairs. Any thread."""
        for call in calls:
            call.forgotten = True
            if call.pair is not None:
                call.pair.claimed = False

    def _on_reached(self, call: Call, met: Address | str) -> None:
        """What came of a call over the network."""
        timer = self._forget(call)
        if timer is None:
            return
        timer.cancel()
        if isinstance(met, str):
            why = f"nobody to link with at {call.place}: {met}"
            call.refuse(LLMStatusCode.LLM_LINK_FAILED, why)
        else:
            self._on_met(call, met, call.place)

    def _forget(self, call: Call) -> Timer | None:
        """A call that the network has answered, or need not answer any more."""
        if self._discovery.remote is not None:
            self._discovery.remote.forget(call)
        return self._calls.pop(call, None)

    def _too_late(self, call: Call) -> None:
        self._forget(call)
        call.refuse(
            LLMStatusCode.LLM_TIMEOUT,
            f"{call.place} did not answer in time (the host is down, the address is wrong, a firewall "
            "drops the packets, or the process there is stopped)",
        )

    def end(self) -> None:
        """Begin no link any more, and wake those who wait for an answer: this engine ends."""
        self._ended = True
        for call, timer in list(self._calls.items()):
            timer.cancel()
            self._forget(call)
            call.refuse(LLMStatusCode.LLM_LINK_FAILED, "this engine was finalized")

    def _on_met(self, call: Call, address: Address, place: HostPort | None) -> None:
        try:
            if call.asks:
                call.found = address
            else:
                call.pair = self._link(address, call, place)
        except DialError as error:
            call.error = error
        call.met.set()

    def _link(self, address: Address, call: Call, place: HostPort | None) -> PairDomain:
        """The pair with an engine, which is asked for it; raises :class:`DialError`."""
        if address.cluster_id == self._discovery.address.cluster_id:
            who = "this engine itself" if address == self._discovery.address else "another engine"
            raise DialError(
                LLMStatusCode.LLM_PARAM_INVALID,
                f"at {call.place} listens {who}, with our own cluster id {address.cluster_id}: give "
                "every engine a cluster id of its own",
            )
        present = self.pairs.get(address.cluster_id)
        if present is not None and present.waiting and present.incarnation != address.incarnation:
            raise DialError(
                LLMStatusCode.LLM_PARAM_INVALID,
                f"at {call.place} listens another engine with cluster id {address.cluster_id}, which "
                "is being linked already: give every engine a cluster id of its own",
            )
        if present is not None and self._formed_by_peer(present, address, call):
            present.claimed = not call.forgotten
            if call.metadata is not None:
                self._builder.give_metadata(present, call.metadata)
            return present
        if present is not None and present.usable:
            other = "" if present.incarnation == address.incarnation else ", to another engine"
            raise DialError(
                LLMStatusCode.LLM_ALREADY_LINK,
                f"cluster {address.cluster_id} is linked already{other}: unlink_clusters first",
            )
        left = max(0.0, call.deadline - time.monotonic())
        pair = self._new_pair(address.cluster_id, address.incarnation, left)
        pair.asked, pair.claimed, pair.place = True, not call.forgotten, place
        if call.metadata is not None:
            pair.metadata = call.metadata
        view = self._views.get(address.incarnation)
        if view is not None:
            self._ask(pair, view)
        elif place is None and not self._discovery.contact(address):
            stranger = self._discovery.strangers.get(address.cluster_id)
            why = f"the listener at {call.place} has ended"
            if stranger is not None:
                why = (
                    f"the engine that listens at {call.place} belongs to another user ({stranger})"
                )
            self._end(pair, LLMStatusCode.LLM_LINK_FAILED, why)
        return pair

    @staticmethod
    def _formed_by_peer(pair: PairDomain, address: Address, call: Call) -> bool:
        """Two that link with each other at once both succeed, whichever comes first."""
        if pair.incarnation != address.incarnation:
            return False
        if pair.waiting or pair.created >= call.began:
            return True
        return pair.usable and not pair.claimed

    def _new_pair(self, cluster: int, incarnation: str, seconds: float) -> PairDomain:
        self._replace(cluster)
        own = self._discovery.address.cluster_id
        pair = PairDomain(
            owner=self,
            name=f"clusters {min(own, cluster)} and {max(own, cluster)}",
            ranks={c: rank for rank, c in enumerate(sorted((own, cluster)))},
            own_cluster=own,
            table=None,
            deadline=time.monotonic() + seconds,
            cluster=cluster,
            incarnation=incarnation,
            metadata=self._metadata,
        )
        self.pairs[cluster] = pair
        pair.expiry = self._reactor.later(seconds, lambda: self._expire(pair))
        return pair

    def _replace(self, cluster: int) -> None:
        """Remove a stale pair whose peer has removed it or is gone."""
        stale = self.pairs.pop(cluster, None)
        if stale is not None:
            log.info("%s: replaced by a new one", stale)
            self._retire(stale, RegisterMemStatus.FAILED, "replaced by a newer link")

    def _ask(self, pair: PairDomain, view: PeerView) -> None:
        self._discovery.hold(view.session, pair)
        view.send(
            Dial(
                link=pair.link_id,
                backend=self._backend,
                one_sided=self._one_sided,
                seconds=seconds_until(pair.deadline),
            )
        )

    def on_session(self, view: PeerView) -> None:
        """An engine that we wait for can be talked to."""
        for pair in self._with(view):
            if pair.waiting and pair.asked:
                self._ask(pair, view)

    # -- answering ---------------------------------------------------------------------------

    def on_dial(self, view: PeerView, message: Dial) -> None:
        """A peer asks for a link."""
        if self._ended:
            return  # our session with it ends at once
        why = self._refusal_reason(view, message)
        if why is not None:
            if view.refusals.is_new(why):
                log.warning("refused a link to cluster %d: %s", view.session.cluster_id, why)
            code = LLMStatusCode.LLM_PARAM_INVALID
            view.send(Refused(link=message.link, status=code, reason=why[:4000]))
            return
        pair = self.pairs.get(view.session.cluster_id)
        crossing = (
            pair is not None
            and pair.waiting
            and pair.asked
            and pair.attempt is None
            and pair.incarnation == view.incarnation
        )
        if crossing and self._discovery.address.incarnation > view.incarnation:
            return  # the peer answers ours
        if pair is not None and pair.usable and pair.incarnation != view.incarnation:
            self._duplicates.on_replaced(pair, view)
        if not crossing or pair is None:
            seconds = min(message.seconds, self._longest)
            pair = self._new_pair(view.session.cluster_id, view.incarnation, seconds)
        self._form(pair, view, message.link)

    def _refusal_reason(self, view: PeerView, message: Dial) -> str | None:
        cluster, own = view.session.cluster_id, self._discovery.address.cluster_id
        if cluster == own:
            return f"both engines have cluster id {own}: give every engine one of its own"
        if message.backend != self._backend:
            return (
                f"cluster {cluster} uses backend {message.backend} and cluster {own} uses "
                f"{self._backend}: set the same transfer_backend at both ends"
            )
        if message.one_sided != self._one_sided:
            states = {True: "on", False: "off"}
            return (
                "enable_remote_cache_accessible must be equal at both ends: it is "
                f"{states[message.one_sided]} at cluster {cluster} and {states[self._one_sided]} at "
                f"cluster {own}"
            )
        return None

    def _form(self, pair: PairDomain, view: PeerView, their_link: int) -> None:
        own = self._discovery.address
        theirs = pair.ranks[pair.cluster]
        members = {
            pair.rank: Member(
                rank=pair.rank,
                cluster_id=own.cluster_id,
                incarnation=own.incarnation,
                link=pair.link_id,
            ),
            theirs: Member(
                rank=theirs, cluster_id=pair.cluster, incarnation=view.incarnation, link=their_link
            ),
        }
        form = Form(domain=secrets.token_hex(16), members=[members[0], members[1]])
        view.send(form)
        self._builder.begin(pair, form.domain, members)

    def on_form(self, view: PeerView, form: Form) -> bool:
        """A peer answers our `Dial`; False when no pair waits for that."""
        members = {member.rank: member for member in form.members}
        pair = next((p for p in self._with(view) if p.waiting and p.asked), None)
        if (
            pair is None
            or {r: m.cluster_id for r, m in members.items()}
            != {r: c for c, r in pair.ranks.items()}
            or members[pair.rank].link != pair.link_id
            or members[pair.rank].incarnation != self._discovery.address.incarnation
            or members[pair.ranks[pair.cluster]].incarnation != view.incarnation
        ):
            return False
        self._builder.begin(pair, form.domain, members)
        return True

    def on_refused(self, view: PeerView, message: Refused) -> None:
        """A peer says why it does not link with us."""
        for pair in self._with(view):
            if pair.waiting and pair.link_id == message.link:
                code = code_of(message.status, LLMStatusCode.LLM_LINK_FAILED)
                self._end(pair, code, message.reason)

    # -- ends --------------------------------------------------------------------------------

    def on_ok(self, pair: PairDomain) -> None:
        """See :class:`~datadist.links.domain.Owner`."""
        pair.status = RegisterMemStatus.OK
        self._release(pair)
        log.info("linked with cluster %d", pair.cluster)
        invalidate_routes(self._views, pair)
        pair.look_timer = self._reactor.later(
            AFTER_SECONDS, lambda: self._duplicates.on_linked(pair)
        )
        self._builder.note_ok(pair)
        pair.settled.set()

    def on_failed(self, pair: PairDomain, reason: str) -> None:
        """See :class:`~datadist.links.domain.Owner`."""
        self._end(pair, LLMStatusCode.LLM_LINK_FAILED, reason)

    def on_dissolved(self, pair: PairDomain) -> None:
        """See :class:`~datadist.links.domain.Owner`."""
        self._end(pair, LLMStatusCode.LLM_LINK_FAILED, "the peer gave up or ended meanwhile")

    def on_member_gone(self, pair: PairDomain, unlinked: bool) -> None:
        """Remove the pair if the peer unlinked. If the peer was lost, the pair stays, broken, until
        unlinked.
        """
        if unlinked and self.pairs.get(pair.cluster) is pair:
            log.info("cluster %d has unlinked", pair.cluster)
            del self.pairs[pair.cluster]
            self._retire(pair, pair.status, None)

    def on_lost(self, view: PeerView, reason: str, orderly: bool) -> None:
        """The session with a peer that has not answered yet ended; in an orderly way: once more."""
        for pair in self._with(view):
            if not pair.waiting or pair.attempt is not None:
                continue
            if not (orderly and self._contact_again(pair)):
                self._end(pair, LLMStatusCode.LLM_LINK_FAILED, f"the peer is gone: {reason}")

    def _contact_again(self, pair: PairDomain) -> bool:
        """Whether a peer whose session ended is, or may be, there."""
        peer = Address(pair.cluster, pair.incarnation)
        if self._discovery.contact(peer):
            return True
        if pair.place is None or self._discovery.remote is None:
            return False

        def reached(met: Address | str) -> None:
            if met != peer:
                why = met if isinstance(met, str) else "another engine listens there now"
                self._end(pair, LLMStatusCode.LLM_LINK_FAILED, f"the peer is gone: {why}")

        self._discovery.remote.contact(pair.place, pair.cluster, reached)
        return True

    def _expire(self, pair: PairDomain) -> None:
        if pair.waiting:
            stage = pair.attempt.stage() if pair.attempt else "waiting for the peer to answer"
            self._end(pair, LLMStatusCode.LLM_TIMEOUT, f"not complete in time, stage: {stage}")

    def _end(self, pair: PairDomain, code: LLMStatusCode, reason: str) -> None:
        if not pair.waiting:
            return
        log.error("%s: %s: %s", pair, code.name, reason)
        self._builder.events.note(LinkEventKind.FAILED, pair, reason)
        pair.code = code
        if self.pairs.get(pair.cluster) is pair:
            del self.pairs[pair.cluster]
        if pair.attempt is not None:
            self._builder.fail(pair.attempt, reason)
        self._retire(pair, RegisterMemStatus.FAILED, reason)

    def _retire(self, pair: PairDomain, status: RegisterMemStatus, reason: str | None) -> None:
        if pair.waiting and pair.code is LLMStatusCode.LLM_SUCCESS:
            pair.code = LLMStatusCode.LLM_LINK_FAILED
        pair.status, pair.reason = status, reason
        pair.closed = True
        self._builder.drop(pair)
        self._release(pair)
        pair.settled.set()

    def _release(self, pair: PairDomain) -> None:
        pair.look_now()
        if pair.expiry is not None:
            pair.expiry.cancel()
        view = self._views.get(pair.incarnation)
        if view is not None:
            self._discovery.release(view.session, pair)

    def _with(self, view: PeerView) -> list[PairDomain]:
        return [pair for pair in self.pairs.values() if pair.incarnation == view.incarnation]

    def remove(self, pair: PairDomain) -> tuple[Attempt | None, dict[PeerView, int]]:
        """Take a pair out for `unlink_clusters`; the caller closes the attempt.

        Also returns what the peer acknowledges once its half is gone.
        """
        if self.pairs.get(pair.cluster) is pair:
            del self.pairs[pair.cluster]
        attempt = pair.attempt
        if pair.waiting:
            pair.code = LLMStatusCode.LLM_LINK_FAILED
        pair.closed = True
        targets = self._builder.leave(pair, attempt) if attempt is not None else {}
        self._release(pair)
        pair.settled.set()
        return attempt, targets

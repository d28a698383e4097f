"""Our side of one communication domain, and of one attempt to build it."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from datadist.base.flag import Flag
from datadist.caches.peers import DomainKey, PeerView, domain_key
from datadist.control.hostport import HostPort
from datadist.control.messages import Announce, Member, OfferMessage
from datadist.control.reactor import Timer
from datadist.control.session import Descriptor
from datadist.control.unreachable_engines import UnreachableEngine
from datadist.links.counters import Counters
from datadist.links.permits import Permits
from datadist.rank_table import RankTable
from datadist.status import LLMStatusCode
from datadist.transport import Capabilities, Link
from datadist.types import RegisterMemStatus

log = logging.getLogger("datadist.link")

PIECES_LOOK_SECONDS = 0.002


@dataclass(eq=False)
class Attempt:
    """Building a domain with known members; dropped and begun anew when a member leaves."""

    token: str
    rank: int
    ranks: list[int]
    """Of all members, ourselves included."""
    members: dict[int, Member]
    """Those that are known: all, or none until the transport's library brought them together."""
    others: list[int] = field(init=False)
    """Ranks of the peers."""
    link: Link | None = None
    opening: bool = False
    regions: list[int] = field(default_factory=list)
    """Ids of our regions that this link exposes."""
    offers: dict[int, tuple[OfferMessage, list[int]]] = field(default_factory=dict)
    attaching: set[int] = field(default_factory=set)
    attached: set[int] = field(default_factory=set)
    unanswered: set[int] = field(default_factory=set)
    """Ranks whose offer was attached, and that were not told so yet."""
    ready: set[int] = field(default_factory=set)
    told_ready: bool = False
    gone: dict[int, str] = field(default_factory=dict)
    """Ranks that can not be reached any more, and why."""
    orderly: set[int] = field(default_factory=set)
    """Those of them that have unlinked or ended in an orderly way."""
    exposed: dict[int, frozenset[int]] = field(default_factory=dict)
    """Region ids of each peer that this link reaches."""
    metadata: dict[int, bytes] = field(default_factory=dict)
    """What the program of each peer gave."""
    capabilities: dict[int, Capabilities] = field(default_factory=dict)
    """What the link can do with each peer; known once it is open."""
    backends: dict[int, str] = field(default_factory=dict)
    """The backend that links us with each peer, where it is not that of the engine."""
    permits: dict[int, Permits] = field(default_factory=dict)
    """Known once the link is open."""
    between_pieces: set[int] = field(default_factory=set)
    """Transfers, by token, that have given their permit to others and wait for it again."""
    counters: dict[int, Counters] = field(default_factory=dict)
    dead: bool = False
    """Whether it was given up."""
    transfers_aborted: bool = False
    """Whether remaining transfers were aborted, since the engine ends."""
    offers_prepared: set[int] = field(default_factory=set)
    """Ranks for which our offer was prepared."""
    joining: bool = False
    """Whether the transport's library is bringing the members together."""
    joined: bool = False
    closing: bool = False
    dropped: bool = False
    """Whether a worker closes it, rather than the thread that unlinks."""
    processes: list[Descriptor] = field(default_factory=list)
    """Of the members, kept open until the link is closed."""
    forcing: threading.Lock = field(default_factory=threading.Lock)
    """Held while the link ends what is in flight, so that it is not closed meanwhile."""
    forced: dict[int, float] = field(default_factory=dict)
    """When it was to end that, by rank (time.monotonic); infinite where it cannot."""
    closed: bool = False
    """Whether the link is being closed, or was."""
    connections: list[Any] = field(default_factory=list)
    """What it uses together with other links; only :mod:`datadist.links.peer_connections` knows more."""
    jobs: int = 0
    idle: Flag = field(default_factory=Flag)
    """Set while no worker is busy with this attempt; each time that one is has a flag of its own."""

    def __post_init__(self) -> None:
        self.idle.set()
        self.others = [rank for rank in self.ranks if rank != self.rank]
        self.counters = {rank: Counters() for rank in self.others}

    @property
    def taken(self) -> set[tuple[str, int]]:
        """Incarnation and link id of every member."""
        return {(member.incarnation, member.link) for member in self.members.values()}

    @property
    def owner(self) -> str:
        """For whom its steps on workers count: the peer, or the attempt where there are several."""
        peers = [m.incarnation for rank, m in self.members.items() if rank != self.rank]
        return peers[0] if len(peers) == 1 else self.token

    def learn(self, link: Link, own: Capabilities) -> None:
        """Note what a link that was opened can do with each peer; ``own`` is what the transport can."""
        self.capabilities = {rank: link.capabilities_of(rank) or own for rank in self.others}
        self.permits = {rank: Permits(can.parallel) for rank, can in self.capabilities.items()}
        backends = {rank: link.backend_of(rank) for rank in self.others}
        self.backends = {rank: name for rank, name in backends.items() if name is not None}

    def rank_of(self, incarnation: str) -> int | None:
        """The rank that an engine has in this attempt."""
        for rank, member in self.members.items():
            if member.incarnation == incarnation:
                return rank
        return None

    def stage(self) -> str:
        """What is being waited for, for people."""
        if not self.opening:
            return "meeting the members"
        if self.link is None:
            return "opening the transport"
        if self.joining:
            return "joining the peers in the transport's library"
        for rank in self.others:
            if rank not in self.attached:
                if rank in self.attaching:
                    return f"attaching the offer of rank {rank}"
                return f"waiting for the offer of {self._who(rank)}"
        missing = [rank for rank in self.others if rank not in self.ready]
        return f"waiting until {', '.join(map(self._who, missing))} is ready"

    def _who(self, rank: int) -> str:
        member = self.members.get(rank)
        who = "" if member is None else f" (cluster {member.cluster_id}; is it stopped or busy?)"
        return f"rank {rank}{who}"

    def abort(self, ranks: Iterable[int]) -> bool:
        """Stop what moves between us and these ranks, and all that would follow.

        Whether bytes of one of them are still being written into our memory, by this process.
        """
        writing = False
        for rank in ranks:
            try:
                if self.link is not None and self.link.abort(rank):
                    writing = True
            except Exception:
                log.exception("defect of the transport: aborting raised; please report it")
        return writing

    def shut_down(
        self, grace_seconds: float, limit: float, before: Callable[[], None]
    ) -> frozenset[int]:
        """Close the transport's link, right after ``before``; not on the reactor.

        Waits ``grace_seconds`` seconds for transfers in flight, then aborts them, and ``limit`` more for
        whatever else is busy. Returns the ranks that may still write our memory.
        """
        self.dead = True
        permits = self.permits  # those of a link that is opened only now are taken by nobody
        held: dict[int, list[bool]] = {rank: [] for rank in permits}
        grace_ends = time.monotonic() + grace_seconds
        while self.between_pieces and time.monotonic() < grace_ends:
            time.sleep(PIECES_LOOK_SECONDS)
        _take_all(permits, held, grace_ends)
        self.abort(self.others)
        deadline = time.monotonic() + limit
        if not self.joining:  # which ends when the link is closed
            self.idle.wait(limit)
        _take_all(permits, held, deadline)
        try:
            before()
            return self.link.close() if self.link is not None else frozenset()
        finally:
            for rank, taken in held.items():
                for _ in taken:
                    permits[rank].release()


def _take_all(permits: dict[int, Permits], held: dict[int, list[bool]], deadline: float) -> None:
    """Take all permits that are not held yet, so that nothing is in flight any more."""
    for rank, taken in held.items():
        permits[rank].take_all(taken, deadline)


class Owner(Protocol):
    """Receives the events of a domain that it formed; called on the reactor."""

    def on_ok(self, domain: Any) -> None:
        """Every member is ready."""

    def on_failed(self, domain: Any, reason: str) -> None:
        """Building it failed for good."""

    def on_dissolved(self, domain: Any) -> None:
        """A member left before it was ready; the attempt was given up."""

    def on_member_gone(self, domain: Any, unlinked: bool) -> None:
        """A member was lost after it was ready; or it ``unlinked``."""


_serials = itertools.count(1)


@dataclass(eq=False, kw_only=True)
class Domain:
    """Members that are linked, or on their way to it, from our side."""

    owner: Owner
    name: str
    ranks: dict[int, int]
    """Cluster id to rank."""
    own_cluster: int
    table: RankTable | None
    """None where the members met by address."""
    deadline: float
    serial: int = field(default_factory=lambda: next(_serials))
    """Newer domains have higher numbers."""
    created: float = field(default_factory=time.monotonic)
    status: RegisterMemStatus = RegisterMemStatus.PREPARING
    reason: str | None = None
    """Why it failed."""
    settled: Flag = field(default_factory=Flag)
    """Set once the status is OK or FAILED, or the domain is unlinked."""
    closed: bool = False
    attempt: Attempt | None = None
    last_failure: str | None = None
    """Why the last attempt was given up."""
    metadata: bytes = b""
    """What our program gives the peers."""
    look_timer: Timer | None = None
    """Has it looked at once more soon after it is OK."""

    def look_now(self) -> None:
        """Do what was to be done soon after it was OK, since it ends."""
        timer, self.look_timer = self.look_timer, None
        call = None if timer is None else timer.call
        if timer is not None and call is not None:
            timer.cancel()
            call()

    @cached_property
    def rank(self) -> int:
        """Our rank."""
        return self.ranks[self.own_cluster]

    @cached_property
    def others(self) -> dict[int, int]:
        """The peers: cluster id to rank."""
        return {c: r for c, r in self.ranks.items() if c != self.own_cluster}

    @property
    def waiting(self) -> bool:
        """Whether it still looks for its members."""
        return not self.closed and self.status is RegisterMemStatus.PREPARING

    def __repr__(self) -> str:
        return f"link {self.name!r}"


@dataclass(eq=False, kw_only=True, repr=False)
class TableDomain(Domain):
    """A domain of `link`, from there until `unlink`."""

    comm_id: int
    announce: Announce
    job: str = ""
    by_library: bool = False
    """Whether the transport's library brings the members together, before they know each other."""
    announced: set[str] = field(default_factory=set)
    """Incarnations of peers that received the announcement."""
    unreachable: list[UnreachableEngine] = field(default_factory=list)
    """Engines with the cluster ids of missing members in other jobs or directories."""
    expiry: Timer | None = None
    """Ends the waiting."""
    search_timer: Timer | None = None
    """Timer that starts the search for missing members."""
    withdraw_timer: Timer | None = None
    """Timer that tells engines outside a formed domain that it looks for nobody."""

    @property
    def searching(self) -> bool:
        """Whether it does not know its members yet."""
        return self.waiting and not (self.attempt and self.attempt.members)

    @cached_property
    def domain_key(self) -> DomainKey:
        """Equal to that of a peer's announcement which means this domain."""
        return domain_key(self.announce)

    def __repr__(self) -> str:
        return f"link {self.name!r} (comm id {self.comm_id})"


LINK_IDS = 1 << 63
"""Added to the serial of a pair: its id in messages, which no comm id equals."""


@dataclass(eq=False, kw_only=True, repr=False)
class PairDomain(Domain):
    """A link to one cluster; ``code`` is the result for `link_clusters`."""

    cluster: int
    incarnation: str
    """The engine at the other end."""
    code: LLMStatusCode = LLMStatusCode.LLM_SUCCESS
    place: HostPort | None = None
    """Where it was met over the network."""
    asked: bool = False
    """Whether our `Dial` is on its way."""
    claimed: bool = False
    """Whether a `link_clusters` of this engine has had this link, as its own or as the peer's."""
    expiry: Timer | None = None
    """Ends the waiting."""

    @property
    def link_id(self) -> int:
        """Names this pair in messages."""
        return LINK_IDS + self.serial

    @property
    def usable(self) -> bool:
        """Whether it is OK and the peer still there."""
        return (
            self.status is RegisterMemStatus.OK
            and self.attempt is not None
            and not self.attempt.gone
        )

    def __repr__(self) -> str:
        return f"link to cluster {self.cluster}"


def invalidate_routes(views: Mapping[str, PeerView], domain: Domain) -> None:
    """Invalidate cached routes to the clusters of a new link, so that transfers use the newest link."""
    for view in views.values():
        if view.session.cluster_id in domain.others:
            view.invalidate_routes()

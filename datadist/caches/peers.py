"""The state of one peer engine during a session."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

from datadist.base.flag import Flag
from datadist.base.range_set import RangeSet
from datadist.base.seen_cases import SeenCases
from datadist.caches.directory import KeyDirectory
from datadist.control.account import Account, Item
from datadist.control.messages import (
    NO_ANSWER,
    Ack,
    Announce,
    Directory,
    Entry,
    Message,
    OfferMessage,
    Sync,
)
from datadist.control.session import Session

DomainKey: TypeAlias = "tuple[str, tuple[tuple[int, int], ...], str]"
"""Identifies a domain: name, mapping, table. Two announcements with equal keys match."""


def domain_key(message: Announce) -> DomainKey:
    """The domain key of an announcement."""
    return message.name, tuple(sorted(message.ranks)), message.table


def do_nothing() -> None:
    """For those who need a call."""


T = TypeVar("T")

MAX_WITHDRAWN = 3
MOST_REFUSALS = 16
OFFER_WINDOW = 8
"""Most unacknowledged offers to one peer; limits the descriptors in flight."""
TOKENS = itertools.count(1)
"""Tokens of transfers. A transfer takes its token before anything is recorded under it. So all
records can be removed, wherever an exception of a signal handler interrupts it.
"""


@dataclass
class Announcement:
    """A peer's announcement of a domain, and the time of its arrival."""

    message: Announce
    at: float = field(default_factory=time.monotonic)


def _characters(message: Announce) -> int:
    return len(message.name) + len(message.table) + sum(map(len, message.endpoints))


class Announcements:
    """A peer's announcements, by link id and by domain key."""

    def __init__(self, account: Account | None = None) -> None:
        self._account = account or Account()
        self._by_link: dict[int, Announcement] = {}
        self._by_meaning: dict[DomainKey, dict[int, Announcement]] = {}
        self.withdrawn: deque[str] = deque(maxlen=MAX_WITHDRAWN)
        """Names of the last withdrawn announcements."""

    def put(self, message: Announce) -> None:
        """Add an announcement; a later one with the same link id replaces it.

        Raises :class:`~datadist.control.account.LimitExceeded`.
        """
        self.pop(message.link)
        self._account.take(Item.WISHES)
        self._account.take(Item.WISH_CHARACTERS, _characters(message))
        announcement = self._by_link[message.link] = Announcement(message)
        self._by_meaning.setdefault(domain_key(message), {})[message.link] = announcement

    def pop(self, link: int) -> None:
        """Remove an announcement, if it exists."""
        announcement = self._by_link.pop(link, None)
        if announcement is not None:
            self._account.give_back(Item.WISHES)
            self._account.give_back(Item.WISH_CHARACTERS, _characters(announcement.message))
            key = domain_key(announcement.message)
            del self._by_meaning[key][link]
            if not self._by_meaning[key]:
                del self._by_meaning[key]

    def withdraw(self, link: int) -> None:
        """Remove a withdrawn announcement, but keep its name."""
        announcement = self._by_link.get(link)
        if announcement is not None and announcement.message.name not in self.withdrawn:
            self.withdrawn.append(announcement.message.name)
        self.pop(link)

    def with_key(self, key: DomainKey) -> dict[int, Announcement]:
        """The announcements with domain key ``key``, by link id, oldest first."""
        return self._by_meaning.get(key, {})

    def __len__(self) -> int:
        return len(self._by_link)

    def __iter__(self) -> Iterator[Announcement]:
        return iter(list(self._by_link.values()))


class PeerView:
    """A peer: what it announced, its directory, and what it has acknowledged of ours.

    The reactor changes it; pulling threads look things up under ``lock``.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.account = Account()
        self.announcements = Announcements(self.account)
        self.refusals = SeenCases(MOST_REFUSALS)
        """Reasons for which links that it asked for were refused: each is logged once."""
        self.told = 0
        """Engines of which it said that they have a cluster id of another one."""
        self.early: dict[str, tuple[OfferMessage, list[int]]] = {}
        self.subscribed = False
        self.gone = False
        """Whether the peer certainly does not access our memory any more."""
        self.on_linked: Callable[[], None] = do_nothing
        """Called when a link to it is OK."""
        self.seq_sent = 0
        self.seq_acked = 0
        self.lock = threading.RLock()
        self.directory = KeyDirectory()
        self.version = 0
        """Changes with every update of the directory, and with every newer link to its cluster."""
        self.consumed: set[int] = set()
        self.covered: dict[int, RangeSet] = {}
        self._begun_anew = False
        """Whether more is to come of a directory that replaces the earlier one."""
        self.pulls: set[int] = set()
        """In flight, by token."""
        self.deferred: deque[tuple[set[int], int]] = deque()
        """Acknowledgements, and the pulls that each waits for. A pull that one waits for is waited for
        by every later one, if it still goes on: the first ones are ready first."""
        self._offers_out = 0
        self._offers: deque[Callable[[], bool]] = deque()
        self._sync_ids = itertools.count(1)
        self._syncs: dict[int, Flag] = {}

    @property
    def incarnation(self) -> str:
        """The peer's incarnation."""
        return self.session.incarnation

    def send(self, message: Message) -> None:
        """Send a message without descriptors."""
        self.session.send(message)

    def send_soon(self, message: Message) -> None:
        """The same, with what else this turn of the control thread sends."""
        self.session.send_soon(message)

    # -- its directory ---------------------------------------------------------------------

    def apply(self, update: Directory) -> None:
        """Take a directory update; acknowledge one that may revoke when no pull uses what it revoked.

        Raises :class:`~datadist.control.account.LimitExceeded`.
        """
        with self.lock:
            self.version += 1
            if update.reset:
                self._begun_anew = True
                self.directory.clear()
            gone = [self.directory.remove(cache_id) for cache_id in update.remove]
            gone += map(self._put, update.upsert)
            if not self._begun_anew:
                self._forget_pulled(itertools.chain(*gone))
            for cache_id, binding_id in update.unbind:
                self.directory.unbind(cache_id, binding_id)
            self._forget_pulled(binding_id for _, binding_id in update.unbind)
            if self._begun_anew and update.last:
                self._begun_anew = False
                bound = self.directory.binding_ids()
                self._forget_pulled({*self.consumed, *self.covered} - bound)
        if update.seq != NO_ANSWER:
            self.acknowledge(update.seq)

    def _put(self, entry: Entry) -> set[int]:
        gone = self.directory.put(entry)
        account, directory = self.account, self.directory
        account.check(Item.CACHES, len(directory.entries))
        account.check(Item.KEYS, directory.keys)
        account.check(Item.TENSORS, directory.tensors)
        return gone

    def _forget_pulled(self, binding_ids: Iterable[int]) -> None:
        """These keys are gone; ids are never reused."""
        for binding_id in binding_ids:
            self.consumed.discard(binding_id)
            self.covered.pop(binding_id, None)

    def invalidate_routes(self) -> None:
        """Invalidate cached routes, since a newer link may be used now."""
        with self.lock:
            self.version += 1
        self.on_linked()

    def acknowledge(self, seq: int) -> None:
        """Send the acknowledgement now, or when the pulls in flight have ended."""
        with self.lock:
            pulls = set(self.pulls)
            if self.deferred and self.deferred[-1][0] == pulls:
                pulls, earlier = self.deferred.pop()
                seq = max(seq, earlier)
            self.deferred.append((pulls, seq))
        self._acknowledge_deferred()

    def pulling(self, pull: Callable[[int], T]) -> T:
        """What ``pull`` returns for the token of a transfer that it begins, and that ends with it.

        It is no context manager for the reason of :meth:`OwnDirectory.using_all`.
        """
        token = next(TOKENS)
        try:
            return pull(token)
        finally:
            self.pulls.discard(token)  # in C: no handler of a signal comes before that
            self.end_pull(token)

    def begin_pull(self, token: int) -> None:
        """Note that a transfer starts; call with ``lock`` held, together with the look-up.

        ``token`` is the next of :data:`TOKENS`.
        """
        self.pulls.add(token)

    def begin_pull_at(self, version: int, token: int) -> bool:
        """:meth:`begin_pull`, unless the directory has changed since it had that version.

        Takes no lock. A pull is recorded before it reads the version. :meth:`apply` changes the
        version before it checks for pulls. So one of the two always sees the other.
        """
        self.pulls.add(token)
        if self.version == version:
            return True
        self.end_pull(token)
        return False

    def end_pull(self, token: int) -> None:
        """Note that it ended, if it began; sends the acknowledgements that waited for it.

        This takes no lock either. A pull is removed before it checks for waiting acknowledgements,
        and an acknowledgement is recorded before it checks for pulls.
        """
        self.pulls.discard(token)
        if self.deferred:
            self._acknowledge_deferred()

    def prolong(self, token: int) -> None:
        """Note a transfer that goes on beyond a call that is under way; ends with :meth:`end_pull`.

        What waits for any call by now waits for it as well.
        """
        with self.lock:
            self.pulls.add(token)
            for pulls, _ in self.deferred:
                pulls.add(token)

    def _acknowledge_deferred(self) -> None:
        """Send before removing the record: if a signal interrupts, sending twice is better than not
        at all.
        """
        done = None
        with self.lock:
            for waiting, seq in self.deferred:
                if not waiting.isdisjoint(self.pulls):
                    break
                done = seq
        if done is not None:
            self.send_soon(Ack(seq=done))
            with self.lock:
                while self.deferred and self.deferred[0][1] <= done:
                    self.deferred.popleft()

    # -- look-ups that miss ------------------------------------------------------------------

    def synchronize(self, timeout: float) -> bool:
        """Wait until everything that the peer has published before now has arrived; False on a
        timeout.

        Returns at once when the peer is gone (``session.closed`` tells).
        """
        sync_id, event = next(self._sync_ids), Flag()
        try:
            self._syncs[sync_id] = event
            self.send(Sync(id=sync_id))
            if self.session.closed:
                event.set()
            return event.wait(timeout) and not self.session.closed
        finally:
            self._syncs.pop(sync_id, None)

    def end_sync(self, sync_id: int) -> None:
        """The answer has come."""
        event = self._syncs.pop(sync_id, None)
        if event is not None:
            event.set()

    def end_all_syncs(self) -> None:
        """Wake everybody: the peer is gone."""
        for sync_id in list(self._syncs):
            self.end_sync(sync_id)

    # -- offers to it ------------------------------------------------------------------------

    def queue_offer(self, give: Callable[[], bool]) -> None:
        """Call ``give`` when fewer than :data:`OFFER_WINDOW` offers are in flight; it returns
        whether it sent one.
        """
        self._offers.append(give)
        self._give_offers()

    def offer_taken(self) -> None:
        """The peer is done with one of our offers."""
        self._offers_out = max(0, self._offers_out - 1)
        self._give_offers()

    def _give_offers(self) -> None:
        while self._offers and self._offers_out < OFFER_WINDOW:
            if self._offers.popleft()():
                self._offers_out += 1

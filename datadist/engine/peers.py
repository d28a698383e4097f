"""What we know of one peer engine while a session with it lasts."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from datadist.control.messages import Ack, Announce, Directory, Message, OfferMessage, Sync
from datadist.control.session import Session
from datadist.engine.directory import KeyDirectory

OFFER_WINDOW = 8
"""Offers on their way to one peer; bounds the descriptors in flight."""


@dataclass
class Announcement:
    """A peer's wish for a domain, and when we heard of it."""

    message: Announce
    at: float = field(default_factory=time.monotonic)


class PeerView:
    """A peer: what it announced, its directory, and what it has acknowledged of ours.

    The reactor changes it; pulling threads look things up under ``lock``.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.announcements: dict[int, Announcement] = {}
        self.early: dict[str, tuple[OfferMessage, list[int]]] = {}
        self.subscribed = False
        self.seq_sent = 0
        self.seq_acked = 0
        self.lock = threading.Lock()
        self.directory = KeyDirectory()
        self.consumed: set[int] = set()
        self.covered: dict[int, set[int]] = {}
        self._pulls: set[int] = set()
        self._tokens = itertools.count(1)
        self._deferred: list[tuple[set[int], int]] = []
        self._offers_out = 0
        self._offers: deque[Callable[[], bool]] = deque()
        self._sync_ids = itertools.count(1)
        self._syncs: dict[int, threading.Event] = {}

    @property
    def incarnation(self) -> str:
        """The peer's incarnation."""
        return self.session.incarnation

    def send(self, message: Message) -> None:
        """Send a message without descriptors."""
        self.session.send(message)

    # -- its directory ---------------------------------------------------------------------

    def apply(self, update: Directory) -> None:
        """Take a directory update, and acknowledge it when no pull uses what it revoked."""
        with self.lock:
            if update.reset:
                self.directory.replace_all(update.upsert)
            else:
                for cache_id in update.remove:
                    self.directory.remove(cache_id)
                for entry in update.upsert:
                    self.directory.put(entry)
            self.consumed &= self.directory.binding_ids() if self.consumed else set()
            self.covered = {k: v for k, v in self.covered.items() if k not in self.consumed}
        self.acknowledge(update.seq)

    def acknowledge(self, seq: int) -> None:
        """Send the acknowledgement now, or when the pulls in flight have ended."""
        with self.lock:
            if self._pulls:
                self._deferred.append((set(self._pulls), seq))
                return
        self.send(Ack(seq=seq))

    def begin_pull(self) -> int:
        """Note that a transfer starts; call with ``lock`` held, together with the look-up."""
        token = next(self._tokens)
        self._pulls.add(token)
        return token

    def end_pull(self, token: int) -> None:
        """Note that it ended; sends the acknowledgements that waited for it."""
        with self.lock:
            self._pulls.discard(token)
            for waiting, _ in self._deferred:
                waiting.discard(token)
            done = [seq for waiting, seq in self._deferred if not waiting]
            self._deferred = [item for item in self._deferred if item[0]]
        if done:
            self.send(Ack(seq=max(done)))

    # -- look-ups that miss ------------------------------------------------------------------

    def ask(self, sync_id: int) -> None:
        """Ask the peer to answer once everything published before was sent."""
        self.send(Sync(id=sync_id))

    def start_sync(self) -> tuple[int, threading.Event]:
        """A new id for a Sync message and the event that its answer sets."""
        sync_id = next(self._sync_ids)
        event = self._syncs[sync_id] = threading.Event()
        return sync_id, event

    def end_sync(self, sync_id: int) -> None:
        """The answer has come, or is not wanted any more."""
        event = self._syncs.pop(sync_id, None)
        if event is not None:
            event.set()

    def end_all_syncs(self) -> None:
        """Wake everybody: the peer is gone."""
        for sync_id in list(self._syncs):
            self.end_sync(sync_id)

    # -- offers to it ------------------------------------------------------------------------

    def queue_offer(self, give: Callable[[], bool]) -> None:
        """Call ``give`` once fewer than the window are out; it says whether it sent one."""
        self._offers.append(give)
        self._give_offers()

    def offer_taken(self) -> None:
        """The peer attached one of our offers."""
        self._offers_out = max(0, self._offers_out - 1)
        self._give_offers()

    def _give_offers(self) -> None:
        while self._offers and self._offers_out < OFFER_WINDOW:
            if self._offers.popleft()():
                self._offers_out += 1

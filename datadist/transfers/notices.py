"""Messages of the program to linked clusters, and those that a transfer sends when its data is in place.

A sender needs a credit for each message, which the receiver grants as its program takes messages: at
most :data:`WINDOW` of one cluster wait there. Who has none waits on its own thread; control messages,
other peers and links go on. What the program does not take costs bounded memory at both ends.

Credits belong to a session. A sender without any asks for some, once, and says how many it has used
up; so those that an interrupted call has lost come back.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from datadist.base.event_queue import EventQueue
from datadist.caches.peers import TOKENS, PeerView, do_nothing
from datadist.control.account import Item
from datadist.control.messages import MAX_NOTICE, AskRoom, Notice, Room
from datadist.control.reactor import Reactor
from datadist.links.permits import Permits
from datadist.status import LLMException, LLMStatusCode, param_invalid
from datadist.transfers.limits import CallLimit
from datadist.transfers.transfer import Transfers
from datadist.types import ReceivedMessage

__all__ = ["MAX_BYTES", "WINDOW", "Notices"]

log = logging.getLogger("datadist.transfer")

MAX_BYTES = MAX_NOTICE
WINDOW = 64
"""Messages of one cluster that wait for the program, or are on their way to it."""
MAX_WAITING = 4096
"""Of all clusters: while so many wait, 32 MiB, nobody gets a credit; those that were given count."""


@dataclass(eq=False)
class _Window:
    """The credits of one session, in both directions."""

    credits: Permits = field(default_factory=lambda: Permits(0))
    """Ours, of which each message takes one."""
    issued: int = 0
    """How many we have got so far."""
    lost: bool = False
    """Whether the peer is gone, or no link leads to it any more: those who wait are woken."""
    sending: dict[int, list[bool]] = field(default_factory=dict)
    """Messages on their way to the session, by token: whether each has taken its credit."""
    asked_with: tuple[int, int] | None = None
    """What was issued and used up when we asked for credits last."""
    received: int = 0
    """Messages of the peer."""
    unused: int = 0
    """Credits of the peer that it has used up without sending."""
    granted: int = 0
    """Credits of the peer so far."""
    asked: bool = False
    """Whether the peer waits for one."""


class Notices:
    """Both ends. :meth:`send`, :meth:`notify` and :meth:`take` are for any thread, the rest for the
    reactor."""

    def __init__(
        self, transfers: Transfers, reactor: Reactor, own_cluster: int, over: Callable[[], bool]
    ) -> None:
        self._transfers = transfers
        self._reactor = reactor
        self._own_cluster = own_cluster
        self._over = over
        self.inbox: EventQueue[ReceivedMessage] = EventQueue()
        self._windows: dict[PeerView, _Window] = {}
        self._waiting: Counter[int] = Counter()
        """Messages in the inbox by cluster; the program may have taken some of them."""
        self._untold = 0
        """Messages that were taken without a look at the credits since."""
        self._asked = False
        """Whether somebody may wait for a credit, so that each message that is taken counts."""

    # -- sending -----------------------------------------------------------------------------

    def send(self, cluster: int, data: bytes, limit: CallLimit) -> None:
        """Send a message to a linked cluster.

        Raises LLMException: LLM_PARAM_INVALID for our own cluster, LLM_NOT_YET_LINK, LLM_TIMEOUT when
        the program there does not take its messages, LLM_ENGINE_FINALIZED.
        """
        if cluster == self._own_cluster:
            raise param_invalid(
                f"cluster {cluster} is this engine: name the cluster of another one"
            )
        limit.begin(self._transfers.timeout)
        self._send(self._transfers.routes(cluster, limit.deadline)[0].view, data, limit)

    def notify(self, data: bytes, limit: CallLimit) -> None:
        """Send a message to the peer of the transfer that ``limit`` was for. Raises as :meth:`send`."""
        assert limit.peer is not None
        try:
            self._send(limit.peer, data, limit)
        except LLMException as error:
            raise LLMException(
                f"the data is in place, but the message of notify was not sent: {error.args[0]}",
                status_code=error.status_code,
            ) from error

    def _send(self, view: PeerView, data: bytes, limit: CallLimit) -> None:
        window = self._windows.get(view)
        if window is None:
            raise self._gone(view, limit)
        token = next(TOKENS)
        try:
            self._send_with_credit(view, window, data, limit, token)
        finally:
            window.sending.pop(token, None)

    def _send_with_credit(
        self, view: PeerView, window: _Window, data: bytes, limit: CallLimit, token: int
    ) -> None:
        taken: list[bool] = []
        window.sending[token] = taken
        if not window.credits.free:
            self._ask(view, window)
        window.credits.take(taken, limit.left)
        if window.lost or view.session.closed:
            window.credits.release()  # wakes the next one
            raise self._gone(view, limit)
        if not taken:
            raise LLMException(
                f"cluster {view.session.cluster_id} did not take its messages within {limit}: it is "
                f"stopped, or {WINDOW} wait there, and its program has to call messages()",
                status_code=LLMStatusCode.LLM_TIMEOUT,
            )
        view.send(Notice(data=data))

    @staticmethod
    def _ask(view: PeerView, window: _Window) -> None:
        """Ask for credits, unless we have asked with the same numbers: the peer keeps that in mind."""
        issued = window.issued
        used = issued - sum(True in taken for taken in list(window.sending.values()))
        if window.asked_with != (issued, used):
            view.send(AskRoom(used=used))
            window.asked_with = issued, used  # not before: a handler of a signal may raise

    def _gone(self, view: PeerView, limit: CallLimit) -> LLMException:
        if self._over():
            return LLMException(
                "the engine was finalized meanwhile", status_code=LLMStatusCode.LLM_ENGINE_FINALIZED
            )
        try:
            self._transfers.routes(view.session.cluster_id, limit.deadline)
        except LLMException as error:
            return error
        return LLMException(
            f"cluster {view.session.cluster_id} was unlinked meanwhile, or has ended, and is linked "
            "again: send it once more",
            status_code=LLMStatusCode.LLM_NOT_YET_LINK,
        )

    def on_room(self, view: PeerView, message: Room) -> None:
        """A peer grants us credits."""
        window = self._windows[view]
        while window.issued < message.limit and window.credits.free < WINDOW:
            window.issued += 1
            window.credits.release()

    # -- receiving ---------------------------------------------------------------------------

    def take(self) -> list[ReceivedMessage]:
        """All messages that wait, in the order of their arrival."""
        if not len(self.inbox):
            return []
        untold, self._untold = self._untold, WINDOW  # where it is interrupted, the next one tells
        taken: list[ReceivedMessage] = []
        try:
            self.inbox.take_into(taken)
            self._untold = untold + len(taken)
            if self._asked or self._untold >= WINDOW // 2:
                self._reactor.post(self._grant_all)
            return taken
        except BaseException:
            self.inbox.put_back(taken)
            raise

    def on_notice(self, view: PeerView, message: Notice) -> None:
        """A message for the program. Raises :class:`~datadist.control.account.LimitExceeded`."""
        window, cluster = self._windows[view], view.session.cluster_id
        window.received += 1
        view.account.check(Item.NOTICES, self._waiting[cluster] + 1)
        view.account.check(Item.NOTICES_WITHOUT_CREDIT, window.received - window.granted)
        self._waiting[cluster] += 1
        self.inbox.put(ReceivedMessage(cluster, message.data))

    def on_ask(self, view: PeerView, message: AskRoom) -> None:
        """A peer has no credit left."""
        window = self._windows[view]
        window.unused = max(0, min(message.used, window.granted) - window.received)
        window.asked = self._asked = True  # before it is counted: who takes some later tells
        self._recount()
        self._grant(view, window)

    def _grant_all(self) -> None:
        self._untold = 0
        self._asked = any(window.asked for window in self._windows.values())
        self._recount()
        for view, window in self._windows.items():
            self._grant(view, window)

    def _recount(self) -> None:
        """What the program has taken does not wait any more."""
        self._waiting = Counter(message.cluster_id for message in self.inbox.waiting())

    def _grant(self, view: PeerView, window: _Window) -> None:
        """Grant what there is room for: at once to who waits, else half a window at a time."""
        if view.session.closed or not (window.asked or window.granted):
            return
        cluster = view.session.cluster_id
        room = min(
            WINDOW - self._waiting[cluster], max(0, MAX_WAITING - sum(self._waiting.values()))
        )
        limit = window.received + window.unused + room
        if limit <= window.granted or not (window.asked or limit - window.granted >= WINDOW // 2):
            return
        if not self._transfers.leads_to(view):  # else our end of the link is OK in a moment
            return
        window.granted, window.asked = limit, False
        view.send(Room(limit=limit))

    # -- sessions ----------------------------------------------------------------------------

    def on_session(self, view: PeerView) -> None:
        """A peer was met."""
        self._windows[view] = _Window()
        view.on_linked = lambda: self._grant(view, self._windows[view])

    def on_lost(self, view: PeerView) -> None:
        """A peer's session is over: what it sent stays, who waits for its credits is woken."""
        window = self._windows.pop(view, None)
        view.on_linked = do_nothing
        if window is not None:
            window.lost = True
            window.credits.release()

    def on_unlinked(self) -> None:
        """Some link has ended: who waits for credits of a peer to which none leads is woken.

        The session may go on, and with it a window of the same numbers, without the credits.
        """
        for view, window in list(self._windows.items()):
            if not self._transfers.leads_to(view):
                self._windows[view] = replace(
                    window, credits=Permits(0), sending={}, asked_with=None
                )
                window.lost = True
                window.credits.release()

    def tell(self) -> None:
        """Nothing of it has a thread."""

    def close(self) -> None:
        """The end: nobody is told of messages any more."""
        self.inbox.close()

"""Dispatches messages of peers to the parts of the engine. Runs on the reactor's thread."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack

from datadist.caches.owned import OwnDirectory
from datadist.caches.peers import PeerView
from datadist.control.discovery import Discovery
from datadist.control.messages import (
    Ack,
    Announce,
    AskRoom,
    Attached,
    Consume,
    Dial,
    Directory,
    Dissolve,
    Duplicate,
    Fail,
    Fetch,
    Fetched,
    Form,
    Left,
    Message,
    Mismatch,
    Notice,
    OfferMessage,
    Ready,
    Refused,
    Room,
    Sync,
    Synced,
    Verified,
    Verify,
    Withdraw,
)
from datadist.control.session import Session
from datadist.grants.messages import GrantMessages
from datadist.links.building import ACKS, Builder
from datadist.links.clusters import Clusters
from datadist.links.duplicates import Duplicates
from datadist.links.links import Links
from datadist.links.lost_peers import LostPeers
from datadist.transfers.fetch import Fetches
from datadist.transfers.notices import Notices
from datadist.transfers.verify import Verification

log = logging.getLogger("datadist.control")


class Dispatcher:
    """Connects the sessions with the parts that handle their messages."""

    def __init__(
        self,
        discovery: Discovery,
        views: dict[str, PeerView],
        links: Links,
        clusters: Clusters,
        builder: Builder,
        fetches: Fetches,
        owned: OwnDirectory,
        verification: Verification,
        lost_peers: LostPeers,
        duplicates: Duplicates,
        grants: GrantMessages,
        notices: Notices,
    ) -> None:
        self._discovery = discovery
        self._views = views
        self._links = links
        self._clusters = clusters
        self._builder = builder
        self._fetches = fetches
        self._owned = owned
        self._verification = verification
        self._lost_peers = lost_peers
        self._duplicates = duplicates
        self._grants = grants
        self._notices = notices
        discovery.on_session = self._on_session
        discovery.on_message = self._on_message
        discovery.on_lost = self._on_lost

    def _on_session(self, session: Session) -> None:
        view = self._views[session.incarnation] = PeerView(session)
        self._notices.on_session(view)
        self._duplicates.on_session(view)
        self._links.on_session(view)
        self._clusters.on_session(view)
        self._builder.on_session(view)

    def _on_lost(self, session: Session, reason: str, orderly: bool) -> None:
        view = self._views.get(session.incarnation)
        if view is not None and view.session is session:
            del self._views[session.incarnation]
            steps: list[Callable[[], None]] = [
                lambda: self._lost_peers.on_lost(
                    view,
                    None if orderly else session.process,
                    not orderly and session.unseen,
                    lambda: self._builder.on_lost(view, reason, orderly),
                ),
                view.end_all_syncs,  # waiting threads then see that the peer is gone
                lambda: self._links.on_lost(view, orderly),
                lambda: self._clusters.on_lost(view, reason, orderly),
                lambda: self._fetches.on_gone(view),
                lambda: self._verification.on_gone(view),
                lambda: self._grants.on_gone(view),
                lambda: self._notices.on_lost(view),
            ]
            with ExitStack() as stack:  # each runs, whatever another one raises
                for step in reversed(steps):
                    stack.callback(step)

    def _on_message(self, session: Session, message: Message, fds: list[int]) -> None:
        view = self._views.get(session.incarnation)
        if view is None or view.session is not session:
            session.discard(fds)
            return
        if isinstance(message, OfferMessage):
            self._builder.on_offer(view, message, fds)
        elif isinstance(message, Duplicate):
            self._duplicates.on_report(view, message)
        elif not (
            self._on_matching(view, message)
            or self._on_directory(view, message)
            or self._on_notices(view, message)
        ):
            session.close(f"it sent {message.kind} where that has no meaning")

    def _on_matching(self, view: PeerView, message: Message) -> bool:
        match message:
            case Announce():
                self._links.on_announce(view, message)
            case Withdraw():
                view.announcements.withdraw(message.link)
            case Mismatch():
                self._links.on_mismatch(view, message)
            case Form():
                self._on_form(view, message)
            case Dial():
                self._builder.check_room(view)
                self._clusters.on_dial(view, message)
            case Refused():
                self._clusters.on_refused(view, message)
            case Dissolve():
                self._builder.on_dissolve(view, message)
            case Fail():
                self._builder.on_fail(view, message)
            case Attached():
                view.offer_taken()
            case Ready():
                self._builder.on_ready(view, message)
            case Left():
                self._builder.on_left(view, message)
            case _:
                return False
        return True

    def _on_notices(self, view: PeerView, message: Message) -> bool:
        match message:
            case Notice():
                self._notices.on_notice(view, message)
            case AskRoom():
                self._notices.on_ask(view, message)
            case Room():
                self._notices.on_room(view, message)
            case _:
                return False
        return True

    def _on_form(self, view: PeerView, form: Form) -> None:
        self._builder.check_room(view)
        if self._builder.knows(form.domain):  # every domain has a token of its own
            self._builder.refuse(view, form.domain, "another domain has that token")
        elif not (self._links.on_form(view, form) or self._clusters.on_form(view, form)):
            self._builder.refuse(view, form.domain, "a member is not waiting any more")

    def _on_directory(self, view: PeerView, message: Message) -> bool:
        match message:
            case Directory():
                view.apply(message)
            case Ack():
                self._owned.revocations.on_ack(view, message.seq)
                if view.seq_acked >= view.seq_sent:
                    self._discovery.release(view.session, ACKS)
            case Consume():
                self._owned.consumed(message.cache_id, message.binding, message.start, message.stop)
            case Sync():
                self._owned.publication.answer_sync(view, message.id)
            case Synced():
                view.end_sync(message.id)
            case Fetch():
                self._fetches.on_fetch(view, message)
            case Fetched():
                self._fetches.on_fetched(view, message)
            case Verify():
                self._verification.on_verify(view, message)
            case Verified():
                self._verification.on_verified(view, message)
            case _:
                return self._grants.on_message(view, message)
        return True

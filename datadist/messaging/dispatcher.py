"""The sessions of a transport, and which of them an event of the engine is for."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

from datadist.base.pidfds import has_ended
from datadist.base.texts import short_repr
from datadist.messaging.ending import End
from datadist.messaging.engine import (
    Arrived,
    Completed,
    Endpoint,
    Engine,
    EngineError,
    EngineEvent,
    Lost,
)
from datadist.messaging.farewells import SESSION_ENDED, Farewells, FarewellToken
from datadist.messaging.loop import Loop
from datadist.messaging.pieces import Spans
from datadist.messaging.session import TICK_SECONDS, Session, Token
from datadist.messaging.side import Side
from datadist.messaging.spare import SpareMessages
from datadist.messaging.transfer import Transfer
from datadist.messaging.unconfirmed import Unconfirmed
from datadist.messaging.wire import (
    HEADER_BYTES,
    MAX_REASON,
    SECRET_BYTES,
    Header,
    Kind,
    OfferFields,
    WireError,
    pack,
    parse_header,
)
from datadist.transport import LinkError, Peer, TransferError

__all__ = ["Dispatcher"]

log = logging.getLogger("datadist.messaging")

USUAL_WHERE_BOTH_CLOSE = Kind.CLOSED, Kind.BYE
"""Messages that may come when nobody here expects them any more."""
UNUSED_SECONDS = 5.0
"""An endpoint is kept so long after its last link, since the peer may be about to link again."""
CLOSE_SECONDS = 1.0
"""So long an endpoint may take to send what tells the peer of the end."""
CONFIRM_SECONDS = 30.0
"""So long an endpoint is kept to hear that the peer takes no bytes of writes any more."""
MAX_REMOVED = 64
"""Sides of closed links per session whose peer has not closed its own."""
MAX_UNSENT = 64
"""Messages of a session that are not sent; over that, who greets a side that is gone gets no answer."""
MAX_RETIRED = 2
"""Sessions with one peer that are not used any more, and wait for the end of the peer's."""


class Dispatcher:
    """Runs on the thread of :attr:`loop`, but for :meth:`add_side`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.address = engine.address
        self._sides: dict[bytes, Side] = {}
        """By our secret."""
        self._of_side: dict[Side, Session] = {}
        """Of sides that were attached; as long as the peer may send requests over them."""
        self._by_secret: dict[bytes, Session] = {}
        """All that have not ended."""
        self._by_incarnation: dict[str, Session] = {}
        """Those for new links."""
        self._holds: Counter[str] = Counter()
        """How many use the session with a peer: links, and core itself."""
        self._pidfds: dict[Session, int] = {}
        self._closing: dict[Session, float] = {}
        """Ended sessions that still send, until this time."""
        self.spare = SpareMessages(engine.window)
        self._kept: list[object] = []
        """What the engine may use until it is closed."""
        self._warned: set[str] = set()
        self.loop = Loop(engine, self)
        self._unconfirmed = Unconfirmed(self.loop, self._confirmed)
        self._farewells = Farewells(engine, self.loop.expect_tick, self._send_closed)

    # -- links -----------------------------------------------------------------------------------

    def add_side(self, side: Side) -> None:
        """The side may be offered from now on. From any thread."""
        self._sides[side.secret] = side

    def attach(self, side: Side, peer: Peer, offer: OfferFields, theirs: Spans) -> None:
        """Connect a side to its peer, whose session it shares. Raises :class:`LinkError`."""
        if side.ended is not None:
            raise LinkError(side.ended, peer.rank)
        session = self._by_incarnation.get(peer.incarnation)
        if session is not None and session.address != offer.address:
            session.end("its engine was closed, and it has another one now", End.GONE)
            session = None
        if session is not None and session.connection is not peer.connection:
            if all(each.removed for each in session.sides):
                session.connection = peer.connection
            else:  # core is about to say that it has lost the connection of those
                self._lose(session)
                session = None
        if session is None:
            session = self._connect(peer, offer)
        self.hold(peer.incarnation)
        side.attached(offer, theirs, peer.incarnation)
        self._of_side[side] = session
        session.sides.add(side)
        self._guarded(session, partial(self._greet, session, side))
        if session.ended is not None:
            raise LinkError(f"rank {peer.rank} cannot be reached: {session.ended}", peer.rank)

    def _greet(self, session: Session, side: Side) -> None:
        self._meet(session, side)
        session.greet(side)

    def _meet(self, session: Session, side: Side) -> None:
        if side.peer_attached:
            self._unconfirmed.greeted(session.incarnation, side.peer_begun)
            session.meet(side)

    def _connect(self, peer: Peer, offer: OfferFields) -> Session:
        try:
            endpoint = self._engine.connect(offer.address)
        except Exception as error:
            raise LinkError(f"rank {peer.rank} cannot be reached: {error}", peer.rank) from error
        window = min(self._engine.window, offer.window)
        session = Session(self, self._engine, endpoint, peer.incarnation, offer.address, window)
        session.connection = peer.connection
        self._by_incarnation[peer.incarnation] = self._by_secret[session.secret] = session
        if peer.pidfd is not None:
            try:
                self._watch_process(session, peer.pidfd)
            except OSError as error:
                session.end(f"its process cannot be watched: {error}", End.TOLD)
                raise LinkError(f"rank {peer.rank}: {session.ended}", peer.rank) from error
        return session

    def _watch_process(self, session: Session, pidfd: int) -> None:
        own = os.dup(pidfd)
        try:
            self.loop.watch(own, lambda: session.end("its process has ended", End.GONE))
        except BaseException:
            os.close(own)
            raise
        self._pidfds[session] = own

    def start(self, side: Side, transfer: Transfer) -> None:
        """Begin a transfer over an attached side."""
        session = self._of_side.get(side)
        if session is None:
            transfer.end(side.error() or TransferError("the link is closed"))
        else:
            self._guarded(session, partial(session.start, transfer))

    def end_side(self, side: Side, reason: str) -> None:
        """Nothing is moved over this side any more, in both directions."""
        side.end(reason)
        session = self._of_side.get(side)
        if session is not None:
            self._guarded(session, partial(session.tell_closed, side))

    def remove_side(self, side: Side) -> None:
        """The link was closed. Requests of the peer are refused until it has closed its side, too."""
        if side.removed:
            return
        side.removed = True
        session = self._of_side.get(side)
        if session is not None:
            self._guarded(session, partial(session.tell_closed, side))
        elif side.offer is None and side.peer_attached:
            self._decline(side.peer_session, side.peer_secret)
        if session is None or side.peer_closed:
            self._forget(side)
        else:
            side.forget_ranges()
            self._limit_removed(session, side)
        if side.incarnation is not None:
            self.release(side.incarnation)

    def _limit_removed(self, session: Session, side: Side) -> None:
        """Keep a side until the peer has closed its own, which it may never do."""
        if side not in session.sides:
            return  # the session has ended
        session.removed[side] = None
        if len(session.removed) > MAX_REMOVED:
            oldest = next((each for each in session.removed if not session.asks(each)), None)
            if oldest is not None:
                self._forget(oldest)

    def _decline(self, peer_session: bytes, peer_secret: bytes) -> None:
        """Tell a peer that our side has ended, which has never attached its offer."""
        sessions = self._by_secret.values()
        session = next((each for each in sessions if each.knows(peer_session)), None)
        if session is not None and session.unsent < MAX_UNSENT:
            message = pack(Kind.CLOSED, peer_secret, body=b"the link is closed")
            self._guarded(session, partial(session.send, message))

    def _forget(self, side: Side) -> None:
        if side not in self._unconfirmed:
            self._sides.pop(side.secret, None)
        session = self._of_side.pop(side, None)
        if session is not None:
            session.sides.discard(side)
            session.removed.pop(side, None)

    # -- peers -----------------------------------------------------------------------------------

    def hold(self, incarnation: str) -> None:
        """Keep the session with a peer, if there is one, until :meth:`release`."""
        self._holds[incarnation] += 1
        session = self._by_incarnation.get(incarnation)
        if session is not None:
            session.unused_since = None

    def release(self, incarnation: str) -> None:
        """Undo :meth:`hold`."""
        self._holds[incarnation] -= 1
        if self._holds[incarnation] > 0:
            return
        del self._holds[incarnation]
        session = self._by_incarnation.get(incarnation)
        if session is not None:
            session.unused_since = time.monotonic()
            self.loop.expect_tick(TICK_SECONDS)

    def lose(self, peer: Peer) -> None:
        """Core has lost the peer's connection. The peer hears of that, if its process is there."""
        self._unconfirmed.lost(peer)
        for session in list(self._by_secret.values()):
            if session.incarnation == peer.incarnation and session.connection is peer.connection:
                self._lose(session)

    def _lose(self, session: Session) -> None:
        pidfd = self._pidfds.get(session)
        how = End.GONE if pidfd is None or has_ended(pidfd) else End.UNHEARD
        session.end("the connection of the engines was lost", how)

    # -- what sessions need ------------------------------------------------------------------------

    def expect_tick(self, seconds: float) -> None:
        """See :class:`~datadist.messaging.session.Keeper`."""
        self.loop.expect_tick(seconds)

    def retire(self, session: Session) -> None:
        """See :class:`~datadist.messaging.session.Keeper`."""
        del self._by_incarnation[session.incarnation]
        self._guarded(session, session.retire)
        retired = [
            each for each in self._by_secret.values()
            if each.retired and each.incarnation == session.incarnation
        ]  # fmt: skip
        for each in retired[:-MAX_RETIRED]:
            each.end("it is not used any more", End.TOLD)

    def keep(self, buffer: object) -> None:
        """See :class:`~datadist.messaging.session.Keeper`."""
        self._kept.append(buffer)

    def session_ended(self, session: Session, how: End) -> None:
        """See :class:`~datadist.messaging.session.Keeper`."""
        self._by_secret.pop(session.secret, None)
        if self._by_incarnation.get(session.incarnation) is session:
            del self._by_incarnation[session.incarnation]
        pidfd = self._pidfds.pop(session, None)
        if pidfd is not None:
            self.loop.unwatch(pidfd)
        gone = how is End.GONE or (pidfd is not None and has_ended(pidfd))
        if gone or session.all_retired:  # or both ends have closed all links
            session.told.clear()
        if session.unconfirmed:
            self._unconfirmed.add(session, pidfd)
        elif pidfd is not None:
            os.close(pidfd)
        for side in list(session.sides):
            self._forget(side)
        told = how in (End.TOLD, End.UNHEARD)
        if told and (session.unsent or session.unconfirmed):
            seconds = CONFIRM_SECONDS if session.unconfirmed else CLOSE_SECONDS
            self._closing[session] = time.monotonic() + seconds
            self.loop.expect_tick(TICK_SECONDS)
        else:
            self._close_endpoint(session)

    def _confirmed(self, side: Side) -> None:
        if side.removed or side not in self._of_side:
            self._sides.pop(side.secret, None)
        for session in list(self._closing):
            self._close_if_done(session)

    def _close_if_done(self, session: Session) -> None:
        waits = session.unconfirmed and self._unconfirmed.waits_for(session.incarnation)
        if session in self._closing and not session.unsent and not waits:
            self._close_endpoint(session)

    def _close_endpoint(self, session: Session) -> None:
        self._closing.pop(session, None)
        try:
            session.endpoint.close()
        except Exception:
            log.exception("unexpected error of an engine; please report it")
        if session.undelivered or session.unsent:
            self._farewells.add(session.address, session.told)

    def _send_closed(self, address: bytes, closed: Mapping[bytes, bytes]) -> bool:
        """Over the session with this engine; False if there is none."""
        sessions = self._by_incarnation.values()
        session = next((each for each in sessions if each.address == address), None)
        if session is None:
            return False
        for secret, reason in closed.items():
            session.send(pack(Kind.CLOSED, secret, SESSION_ENDED, reason))
        return session.ended is None

    # -- what the loop calls -----------------------------------------------------------------------

    def event(self, event: EngineEvent) -> None:
        """See :class:`~datadist.messaging.loop.Handler`."""
        if isinstance(event, Arrived):
            self._arrived(event)
        elif isinstance(event, Lost):
            self._lost(event)
        elif isinstance(event, Completed) and isinstance(event.token, Token):
            token, session = event.token, event.token.session
            self._guarded(session, lambda: session.completed(token, event.error))
            self._close_if_done(session)
        elif isinstance(event, Completed) and isinstance(event.token, FarewellToken):
            self._farewells.completed(event.token, event.error)

    def _lost(self, event: Lost) -> None:
        session = self._session_of(event.endpoint)
        if session is not None:
            session.end(event.reason, End.CUT)
        for each in [each for each in self._closing if each.endpoint is event.endpoint]:
            each.undelivered = True
            self._close_endpoint(each)
        self._farewells.lost(event.endpoint)

    def tick(self) -> float | None:
        """See :class:`~datadist.messaging.loop.Handler`."""
        now = time.monotonic()
        for session in list(self._by_secret.values()):
            if session.watched:
                self._guarded(session, partial(session.check, now))
        for session in list(self._by_incarnation.values()):
            if session.unused_since is not None and now - session.unused_since >= UNUSED_SECONDS:
                self.retire(session)
        for session, until in list(self._closing.items()):
            if now >= until:
                self._close_endpoint(session)
        self._farewells.tick(now)
        watched = self._farewells.waiting or any(each.watched for each in self._by_secret.values())
        unused = any(each.unused_since is not None for each in self._by_incarnation.values())
        return TICK_SECONDS if watched or unused or self._closing else None

    def fail(self, reason: str) -> None:
        """See :class:`~datadist.messaging.loop.Handler`."""
        self._farewells.close()
        for session in list(self._by_secret.values()):
            self._guarded(session, partial(session.end, reason, End.CUT))
        for session in list(self._closing):
            self._close_endpoint(session)
        self._unconfirmed.close()
        for side in list(self._sides.values()):
            side.end(reason)

    def is_idle(self) -> bool:
        """Whether everything was sent."""
        sessions = *self._by_secret.values(), *self._closing
        return not self._farewells.sending and not any(each.unsent for each in sessions)

    # -- messages ----------------------------------------------------------------------------------

    def _arrived(self, event: Arrived) -> None:
        try:
            header = parse_header(event.message)
        except WireError as error:
            session = None if event.source is None else self._session_of(event.source)
            if session is None:
                self._warn(str(error))
            else:
                self._violated(session, str(error))
            return
        if header.kind in (Kind.DATA, Kind.DONE, Kind.REFUSED, Kind.BYE):
            session = self._by_secret.get(header.secret)
            side = None
        else:
            side = self._sides.get(header.secret)
            session = None if side is None else self._of_side.get(side)
        if side is not None and header.kind in (Kind.HELLO, Kind.CLOSED):
            self._guarded(session, lambda: self._take_state(side, header, event))
        elif side is not None and side.peer_left:
            return
        elif session is None:
            self._for_nobody(header, event)
        elif header.kind is Kind.BYE:
            self._guarded(session, partial(session.take_bye, event.message))
        elif side is None:
            self._guarded(
                session, lambda: session.take_answer(header.kind, header.number, event.message)
            )
        else:
            self._guarded(
                session,
                lambda: session.take_request(side, header.kind, header.number, event.message),
            )

    def _for_nobody(self, header: Header, event: Arrived) -> None:
        if header.kind is Kind.HELLO:
            self._decline(*_secrets(memoryview(event.message).cast("B")[HEADER_BYTES:]))
        elif header.kind not in USUAL_WHERE_BOTH_CLOSE:
            self._warn(f"a {header.kind.name} is for nobody here; this may be a late message")

    def _take_state(self, side: Side, header: Header, event: Arrived) -> None:
        body = memoryview(event.message).cast("B")[HEADER_BYTES:]
        apart = header.kind is Kind.CLOSED and header.number == SESSION_ENDED
        late, side.peer_left = side.peer_left, side.peer_left or apart
        if late or (header.kind is Kind.CLOSED and side.peer_closed):
            return  # a repeat: who is greeted late may have forgotten that it has said so
        if header.kind is Kind.HELLO and side.peer_attached and body == side.greeting:
            return  # a repeat over another connection
        if side.peer_closed or len(body) > MAX_REASON:
            raise WireError(f"it sent a {header.kind.name} of {len(body)} bytes, or after the end")
        if header.kind is Kind.HELLO:
            if side.peer_attached or len(body) != 2 * SECRET_BYTES:
                raise WireError("it sent a HELLO twice, or without the secrets of session and side")
            side.peer_session, side.peer_secret = _secrets(body)
            side.peer_begun = header.number
            side.peer_attached = True
            session = self._of_side.get(side)
            if session is not None:
                self._meet(session, side)
                session.advance()
            return
        told_before = side.peer_told
        side.peer_closed = side.fenced = True
        told = short_repr(bytes(body).decode(errors="replace"))
        side.end(f"rank {side.rank} has ended its side of the link: {told}")
        self._unconfirmed.confirm(side)
        session = self._of_side.get(side)
        if session is not None:
            session.tell_closed(side)  # which confirms it: nothing of the peer lands here any more
            if apart:
                session.drop_requests(lambda each: each is side)
        if told_before:
            self._forget(side)

    def _guarded(self, session: Session | None, call: Callable[[], None]) -> None:
        """Run a step for one peer; whatever goes wrong in it ends the session with that peer only."""
        try:
            call()
        except WireError as error:
            if session is None:
                self._warn(str(error))
            else:
                self._violated(session, str(error))
        except EngineError as error:
            if session is not None:
                session.end(str(error), End.CUT)
        except Exception as error:
            log.exception("unexpected error in a session; please report it")
            if session is not None:
                session.end(f"{type(error).__name__}: {error}", End.TOLD)

    def _violated(self, session: Session, what: str) -> None:
        if session.ended is None:
            ranks = ", ".join(str(side.rank) for side in session.sides) or "no link"
            log.warning("the session with a peer (rank %s) was ended: %s", ranks, what)
            session.end(f"the peer broke the protocol: {what}", End.TOLD)

    def _warn(self, what: str) -> None:
        """Once per text: whoever reaches the engine can send as many as it likes."""
        if what not in self._warned and len(self._warned) < 20:
            self._warned.add(what)
            log.warning("dropped a message: %s", what)

    def _session_of(self, endpoint: Endpoint) -> Session | None:
        sessions = self._by_secret.values()
        return next((each for each in sessions if each.endpoint is endpoint), None)


def _secrets(body: memoryview) -> tuple[bytes, bytes]:
    """Of the session and the side in a HELLO."""
    return bytes(body[:SECRET_BYTES]), bytes(body[SECRET_BYTES : 2 * SECRET_BYTES])

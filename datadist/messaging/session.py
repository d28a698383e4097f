"""What all links with one peer process share: its endpoint, and the requests in both directions.

Everything here runs on the thread of the engine. Each piece is one request and one answer. The asker
has ``window`` requests without an answer at most, for all links and transfers with that peer, which
take turns. The owner has as many at most (:mod:`datadist.messaging.answering`). So a peer that takes
nothing, or asks too much, fills no memory.

A request whose transfer has ended keeps its place in the window until it is answered, because the
owner may still work on it. Its data is dropped then. Messages keep their order, so late bytes of a write
do not replace newer ones.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from datadist.base.texts import in_seconds
from datadist.messaging.answering import Answering
from datadist.messaging.ending import End
from datadist.messaging.engine import Endpoint, Engine, EngineError
from datadist.messaging.pieces import Piece
from datadist.messaging.side import Side
from datadist.messaging.spare import SpareMessages
from datadist.messaging.transfer import Transfer
from datadist.messaging.wire import (
    HEADER_BYTES,
    MAX_REASON,
    SECRET_BYTES,
    Kind,
    Refusal,
    WireError,
    pack,
    pack_request,
)
from datadist.transport import (
    AddressError,
    TransferError,
    TransferTimeout,
    TransportError,
    Unsupported,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["ANSWER_SECONDS", "Keeper", "Session", "Token"]

log = logging.getLogger("datadist.messaging")

ANSWER_SECONDS = 60.0
"""A request whose transfer has ended is answered within this time, or the session ends."""
RETIRED_SECONDS = 10.0
"""A session that is not used any more ends so long after that, if the peer goes on using its own."""
TICK_SECONDS = 0.5
"""Between two looks at a peer to which something is under way."""
MAX_DROPPED = 1024
MAX_TOLD = 64
"""So many of the sides that both ends have closed are named again if the connection is cut."""


class Keeper(Protocol):
    """What a session needs of the one that keeps it."""

    spare: SpareMessages

    def expect_tick(self, seconds: float) -> None:
        """Call :meth:`Session.check` after so many seconds."""

    def session_ended(self, session: Session, how: End) -> None:
        """Forget the session and its sides, and close the endpoint when all was sent that can be."""

    def retire(self, session: Session) -> None:
        """Use it for new links no more; see :meth:`Session.retire`."""

    def keep(self, buffer: object) -> None:
        """Refer to what the engine may still use until it is closed."""


@dataclass(eq=False)
class Token:
    """A send or put that has not completed."""

    session: Session
    endpoint: Endpoint
    then: Callable[[], None] | None
    message: bytearray | None = None
    """Of a send."""
    completed: bool = False


@dataclass(eq=False)
class _Asked:
    """A request of ours that was not answered."""

    transfer: Transfer
    piece: Piece
    landing: tuple[bytearray, bytes] | None
    """The buffer that the peer may put into, and its name."""
    late_since: float | None = None


class Session:
    """See the text of this module."""

    def __init__(
        self, keeper: Keeper, engine: Engine, endpoint: Endpoint,
        incarnation: str, address: bytes, window: int,
    ) -> None:  # fmt: skip
        self.incarnation = incarnation
        self.address = address
        """Of the peer's engine."""
        self.connection: object = None
        """What core keeps for the peer (:attr:`~datadist.transport.Peer.connection`)."""
        self.begun = time.monotonic_ns()
        self.secret = secrets.token_bytes(SECRET_BYTES)
        """The peer's answers carry it."""
        self.endpoint = endpoint
        self.ended: str | None = None
        self.unused_since: float | None = None
        self.sides: set[Side] = set()
        """Those that were attached, until both processes have closed them."""
        self.removed: dict[Side, None] = {}
        """Those whose link is closed here, the oldest first."""
        self.unsent = 0
        """Messages that the engine has not sent."""
        self.retired = False
        """Not used any more, here; see :meth:`retire`."""
        self.unconfirmed: frozenset[Side] = frozenset()
        """Once it has ended: sides over which the peer may still take bytes of writes."""
        self.undelivered = False
        """Once it has ended: what was sent may not have reached the peer."""
        self.told: dict[bytes, bytes] = {}
        """Reasons of sides that have ended, by the peer's secret. Of closed ones it has the latest."""
        self._retired_at = 0.0
        self._peers: dict[bytes, bool] = {}
        """Sessions of the peer that use ours, by secret; whether they are retired."""
        self._keeper = keeper
        self._engine = engine
        self._window = window
        self._queue: deque[Transfer] = deque()
        self._asked: dict[int, _Asked] = {}
        self._dropped: dict[int, None] = {}
        """Requests that are not waited for, although an answer may come."""
        self._newest = 0
        """When the latest session of the peer began."""
        self._number = 0
        self._landings: list[tuple[bytearray, bytes]] = []
        """Buffers that nobody puts into now."""
        self._answering = Answering(self, engine, window, keeper.spare.take)
        self.take_request = self._answering.take_request

    @property
    def busy(self) -> bool:
        """Whether something is under way."""
        return bool(self._queue or self._asked or self.unsent)

    @property
    def all_retired(self) -> bool:
        """Whether neither end uses it any more."""
        return self.retired and all(self._peers.values())

    @property
    def watched(self) -> bool:
        """Whether it is looked at now and then (:meth:`check`)."""
        return self.busy or self.retired

    # -- asking ----------------------------------------------------------------------------------

    def start(self, transfer: Transfer) -> None:
        """Begin a transfer, unless its caller has left; it is ended if the session has ended."""
        if self.ended is not None:
            transfer.end(transfer.side.error() or TransferError(self.ended))
            return
        if transfer.more:
            self._keeper.expect_tick(TICK_SECONDS)
            self._queue.append(transfer)
            self.advance()

    def advance(self) -> None:
        """Ask for as many pieces as the window permits, of each transfer in turn."""
        while self.ended is None and len(self._asked) < self._window:
            transfer = self._next_transfer()
            if transfer is None:
                return
            self._ask(transfer)
            if transfer.more:
                self._queue.append(transfer)

    def _next_transfer(self) -> Transfer | None:
        for _ in range(len(self._queue)):
            transfer = self._queue.popleft()
            if transfer.more:
                if transfer.side.peer_attached:
                    return transfer
                self._queue.append(transfer)
        return None

    def _ask(self, transfer: Transfer) -> None:
        piece, sent = transfer.take_piece(), False
        try:
            sent = self._ask_for(transfer, piece)
        finally:
            if not sent:
                transfer.not_asked()

    def _ask_for(self, transfer: Transfer, piece: Piece) -> bool:
        number, offer = self._number, transfer.side.offer
        assert offer is not None
        landing = None if transfer.write else self._landing()
        message = pack_request(
            Kind.WRITE if transfer.write else Kind.READ, offer.secret, number, self.secret,
            transfer.seconds_left, piece.remote, piece.length,
            b"" if landing is None else landing[1], piece.size if transfer.write else 0,
            self._keeper.spare.take,
        )  # fmt: skip
        if transfer.write and not transfer.read_local(piece, message, len(message) - piece.size):
            return False
        self._number += 1
        self._asked[number] = _Asked(transfer, piece, landing)
        self.send(message)
        return True

    def _landing(self) -> tuple[bytearray, bytes] | None:
        if not self._engine.puts:
            return None
        if self._landings:
            return self._landings.pop()
        buffer = bytearray(self._engine.piece)
        return buffer, self._engine.expose(buffer)

    def take_answer(self, kind: Kind, number: int, message: Buffer) -> None:
        """An answer has arrived. Raises :class:`WireError` if it answers nothing that was asked."""
        asked = self._asked.get(number)
        if asked is None and number in self._dropped:
            del self._dropped[number]
            return
        if asked is None:
            raise WireError(
                f"it answered request {number}, which was not asked or was answered before"
            )
        body = memoryview(message).cast("B")[HEADER_BYTES:]
        if kind is Kind.REFUSED:
            error = _refused(asked.transfer.side.rank, bytes(body))
            self._answered(number, asked)
            asked.transfer.end(error)
            asked.transfer.answered(asked.piece)
        elif kind is Kind.DATA and not asked.transfer.write and len(body) == asked.piece.size:
            self._answered(number, asked)
            self.advance()  # the peer works on the next piece while this one is copied
            asked.transfer.answered(asked.piece, message, HEADER_BYTES)
        elif kind is Kind.DONE and not body and (asked.transfer.write or asked.landing is not None):
            asked.transfer.answered(asked.piece, asked.landing[0] if asked.landing else None)
            self._answered(number, asked)
        else:
            write = "write" if asked.transfer.write else "read"
            raise WireError(
                f"it answered a {write} of {asked.piece.size} bytes by {kind.name} with {len(body)}"
            )
        self.advance()

    def _answered(self, number: int, asked: _Asked) -> None:
        del self._asked[number]
        if asked.landing is not None:
            self._landings.append(asked.landing)

    # -- sending ---------------------------------------------------------------------------------

    def greet(self, side: Side) -> None:
        """Tell the peer that its offer was attached."""
        assert side.offer is not None
        self.send(pack(Kind.HELLO, side.offer.secret, self.begun, self.secret + side.secret))

    def meet(self, side: Side) -> None:
        """A session of the peer has attached this side. What belonged to its earlier ones is over."""
        secret = side.peer_session
        given_up = side.peer_begun > self._newest and not (
            self.retired or all(self._peers.values())
        )
        if secret not in self._peers:
            self._peers[secret] = False
            if self.retired:
                self.send(pack(Kind.BYE, secret, body=self.secret))
        newest = self._newest = max(self._newest, side.peer_begun)
        for each in self.sides:
            if each.peer_attached and each.peer_begun < newest:
                each.fenced = True
                each.end("its session has ended, and it has begun another one", lost=True)
        if given_up:
            self._renew()
        self.drop_requests(lambda each: each.peer_begun < newest)

    def _renew(self) -> None:
        """Go on over another endpoint: the peer's session has ended, and has closed its own.

        In some engines both are one connection, which loses messages then. What was sent over it matters
        only for sides that have not ended at the peer: those are greeted again, or told of our end.
        """
        old, self.endpoint = self.endpoint, self._engine.connect(self.address)
        self.unsent = 0
        self._answering.clear()
        try:
            old.close()
        except Exception:
            log.exception("unexpected error of an engine; please report it")
        for side in [each for each in self.sides if not each.fenced]:
            if self.ended is not None:
                return
            if side.peer_told:
                side.peer_told = False
                self.tell_closed(side)
            else:
                self.greet(side)

    def drop_requests(self, is_over: Callable[[Side], bool]) -> None:
        """Wait no more for answers over these sides, whose session has ended at the peer."""
        over = {n: asked for n, asked in self._asked.items() if is_over(asked.transfer.side)}
        for number in over:
            del self._asked[number]
            self._dropped[number] = None
        while len(self._dropped) > MAX_DROPPED:
            del self._dropped[next(iter(self._dropped))]
        self._withdraw([asked.landing for asked in over.values() if asked.landing])
        if over:
            self.advance()

    def retire(self) -> None:
        """It is not used any more: new links get another one.

        The endpoint is closed when the peer's sessions are retired, too, or after
        :data:`RETIRED_SECONDS`. In some engines both endpoints are one connection, and the peer may be
        using it for a new link.
        """
        self.retired = True
        self._keeper.expect_tick(TICK_SECONDS)
        self._retired_at = time.monotonic()
        for secret in self._peers:
            self.send(pack(Kind.BYE, secret, body=self.secret))
        self._end_if_unused()

    def take_bye(self, message: Buffer) -> None:
        """A session of the peer is retired. Raises :class:`WireError` if it is none of those."""
        secret = bytes(memoryview(message).cast("B")[HEADER_BYTES:])
        if self._peers.get(secret, True):
            raise WireError("it sent a BYE of a session that is unknown or was ended before")
        self._peers[secret] = True
        self._end_if_unused()
        if self.ended is None and not self.retired and all(self._peers.values()):
            self._leave_retired()

    def _leave_retired(self) -> None:
        """The peer waits for us, but not for long, to close what may be one connection with ours."""
        if self.unused_since is None:
            self._renew()
        else:
            self._keeper.retire(self)

    def _end_if_unused(self) -> None:
        if self.all_retired:
            self.end("it is not used any more", End.TOLD)

    def tell_closed(self, side: Side) -> None:
        """Tell the peer, once, that our side has ended and asks for nothing any more."""
        if side.offer is not None and not side.peer_told:
            side.peer_told = True
            self._note_told(side)
            self.send(pack(Kind.CLOSED, side.offer.secret, body=self.told[side.offer.secret]))

    def _note_told(self, side: Side) -> None:
        if side.offer is not None:
            self.told.pop(side.offer.secret, None)  # it becomes the latest
            self.told[side.offer.secret] = (side.ended or "").encode()[:MAX_REASON]
        if len(self.told) > MAX_TOLD + len(self.sides):
            del self.told[next(iter(self.told))]

    def send(self, message: bytearray, then: Callable[[], None] | None = None) -> None:
        """See :class:`~datadist.messaging.answering.Sender`."""
        token = Token(self, self.endpoint, then, message)
        self._engine_call(token, lambda: self.endpoint.send(message, token))

    def put(self, data: bytearray, target: bytes, then: Callable[[], None]) -> None:
        """See :class:`~datadist.messaging.answering.Sender`."""
        token = Token(self, self.endpoint, then)
        self._engine_call(token, lambda: self.endpoint.put(data, target, token))

    def _engine_call(self, token: Token, begin: Callable[[], None]) -> None:
        self.unsent += 1
        self._keeper.expect_tick(TICK_SECONDS)
        try:
            begin()
        except EngineError as error:
            self.completed(token, str(error))
        except Exception as error:
            log.exception("unexpected error of an engine; please report it")
            self.completed(token, f"{type(error).__name__}: {error}")

    def completed(self, token: Token, error: str | None) -> None:
        """A send or put has ended; what comes for the second time is nothing."""
        if token.completed or token.endpoint is not self.endpoint:
            return
        token.completed = True
        self.unsent -= 1
        if error is not None:
            self.undelivered = True
            self.end(error, End.CUT)
            return
        if token.message is not None:
            self._keeper.spare.give(token.message)
        if self.ended is None and token.then is not None:
            token.then()

    def asks(self, side: Side) -> bool:
        """Whether a write over this side was not answered."""
        asked = self._asked.values()
        return any(each.transfer.side is side and each.transfer.write for each in asked)

    def knows(self, secret: bytes) -> bool:
        """Whether that session of the peer has met this one."""
        return secret in self._peers

    # -- the end ---------------------------------------------------------------------------------

    def check(self, now: float) -> None:
        """Whether the peer lives and answers; called now and then while :attr:`watched`."""
        problem = self.endpoint.problem()
        if problem is not None:
            self.end(problem, End.CUT)
        elif self.retired and now - self._retired_at >= RETIRED_SECONDS:
            self.end("it is not used any more", End.TOLD)
        elif self._is_late(now):
            limit = in_seconds(ANSWER_SECONDS)
            text = f"it did not answer within {limit} after a transfer had ended"
            self.end(text, End.UNHEARD)
        else:
            self._queue = deque(transfer for transfer in self._queue if transfer.more)
            self.advance()

    def _is_late(self, now: float) -> bool:
        for asked in self._asked.values():
            if asked.transfer.ended and asked.late_since is None:
                asked.late_since = now
        times = [each.late_since for each in self._asked.values() if each.late_since is not None]
        return bool(times) and now - min(times) > ANSWER_SECONDS

    def end(self, reason: str, how: End) -> None:
        """End all sides, and the transfers with them."""
        if self.ended is not None:
            return
        self.ended = reason
        self.undelivered = how is End.CUT
        asked, self._asked = self._asked, {}
        landings, self._landings = self._landings, []
        if how is not End.GONE:
            sides = {each.transfer.side for each in asked.values() if each.transfer.write}
            self.unconfirmed = frozenset(side for side in sides if not side.fenced)
        try:
            for side in self.sides:
                side.fenced = side.fenced or how is End.GONE
                side.end(reason, how is not End.TOLD)
                if how in (End.TOLD, End.UNHEARD):
                    self.tell_closed(side)
                else:
                    self._note_told(side)
            self._withdraw([*landings, *(each.landing for each in asked.values() if each.landing)])
            self._dropped.clear()
            self._queue.clear()
            self._answering.clear()
        finally:
            self._keeper.session_ended(self, how)

    def _withdraw(self, landings: list[tuple[bytearray, bytes]]) -> None:
        for landing in landings:
            try:
                self._engine.withdraw(landing[1])
            except Exception as error:  # the peer may put into it: it must stay
                log.error("a buffer is kept, since the engine does not withdraw it: %s", error)
                self._keeper.keep(landing)


def _refused(rank: int, body: bytes) -> TransportError:
    if body == bytes([Refusal.OUTSIDE]):
        return AddressError(f"a segment is not within the memory that rank {rank} offered")
    if body == bytes([Refusal.FORBIDDEN]):
        return Unsupported(f"rank {rank} granted read access only")
    if body == bytes([Refusal.EXPIRED]):
        return TransferTimeout(f"rank {rank} came to a request too late", link_usable=True)
    if body == bytes([Refusal.CLOSED]):
        return TransferError(f"rank {rank} has closed its side of the link")
    raise WireError(f"it refused a request with {body[:16]!r}, which does not exist")

"""What all links with one peer process share: its endpoint, and the requests in both directions.

Everything here runs on the thread of the engine. Each piece is one request and one answer. The asker
has ``window`` requests without an answer at most, for all links and transfers with that peer, which
take turns. The owner has ``window`` answers at most that the engine has not sent, and as many requests
that wait for that: so a peer that takes nothing, or asks too much, fills no memory.

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
from datadist.messaging.engine import Endpoint, Engine, EngineError
from datadist.messaging.pieces import Piece
from datadist.messaging.side import Side
from datadist.messaging.transfer import Transfer
from datadist.messaging.wire import (
    HEADER_BYTES,
    MAX_REASON,
    SECRET_BYTES,
    Kind,
    Refusal,
    Request,
    WireError,
    pack,
    pack_request,
    parse_request,
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
TICK_SECONDS = 0.5
"""Between two looks at a peer to which something is under way."""


class Keeper(Protocol):
    """What a session needs of the one that keeps it."""

    def expect_tick(self, seconds: float) -> None:
        """Call :meth:`Session.check` after so many seconds."""

    def session_ended(self, session: Session, lost: bool) -> None:
        """Forget the session and its sides, and close the endpoint: at once where the peer is lost."""


@dataclass(eq=False)
class Token:
    """A send or put that has not completed."""

    session: Session
    then: Callable[[], None] | None
    completed: bool = False


@dataclass(eq=False)
class _Asked:
    """A request of ours that was not answered."""

    transfer: Transfer
    piece: Piece
    landing: tuple[bytearray, bytes] | None
    """The buffer that the peer may put into, and its name."""
    late_since: float | None = None


@dataclass
class _Waiting:
    """A request of the peer's; the message has the data of a write."""

    side: Side
    kind: Kind
    number: int
    request: Request
    message: Buffer
    expires: float


class Session:
    """See the text of this module."""

    def __init__(
        self, keeper: Keeper, engine: Engine, endpoint: Endpoint,
        incarnation: str, address: bytes, window: int,
    ) -> None:  # fmt: skip
        self.incarnation = incarnation
        self.address = address
        """Of the peer's engine."""
        self.secret = secrets.token_bytes(SECRET_BYTES)
        """The peer's answers carry it."""
        self.endpoint = endpoint
        self.ended: str | None = None
        self.unused_since: float | None = None
        self.sides: set[Side] = set()
        """Those that were attached, until both processes have closed them."""
        self.unsent = 0
        """Messages that the engine has not sent."""
        self.retired = False
        """Not used any more, here; see :meth:`retire`."""
        self._peers: dict[bytes, bool] = {}
        """Sessions of the peer that use ours, by secret; whether they are retired."""
        self._keeper = keeper
        self._engine = engine
        self._window = window
        self._queue: deque[Transfer] = deque()
        self._asked: dict[int, _Asked] = {}
        self._number = 0
        self._landings: list[tuple[bytearray, bytes]] = []
        """Buffers that nobody puts into now."""
        self._waiting: deque[_Waiting] = deque()
        self._answering = 0

    @property
    def busy(self) -> bool:
        """Whether something is under way."""
        return bool(self._queue or self._asked or self.unsent)

    # -- asking ----------------------------------------------------------------------------------

    def start(self, transfer: Transfer) -> None:
        """Begin a transfer; it is ended if the session has ended."""
        if self.ended is not None:
            transfer.end(transfer.side.error() or TransferError(self.ended))
            return
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
        piece, number = transfer.take_piece(), self._number
        offer = transfer.side.offer
        assert offer is not None
        landing = None if transfer.write else self._landing()
        message = pack_request(
            Kind.WRITE if transfer.write else Kind.READ, offer.secret, number, self.secret,
            transfer.seconds_left, piece.remote, piece.length,
            b"" if landing is None else landing[1], piece.size if transfer.write else 0,
        )  # fmt: skip
        if transfer.write and not transfer.read_local(piece, message, len(message) - piece.size):
            return
        self._number += 1
        self._asked[number] = _Asked(transfer, piece, landing)
        self._send(message)

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
        if asked is None:
            raise WireError(
                f"it answered request {number}, which was not asked or was answered before"
            )
        body = memoryview(message).cast("B")[HEADER_BYTES:]
        if kind is Kind.REFUSED:
            error = _refused(asked.transfer.side.rank, bytes(body))
            self._answered(number, asked)
            asked.transfer.end(error)
        elif kind is Kind.DATA and not asked.transfer.write and len(body) == asked.piece.size:
            self._answered(number, asked)
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

    # -- answering -------------------------------------------------------------------------------

    def take_request(self, side: Side, kind: Kind, number: int, message: Buffer) -> None:
        """A request of the peer has arrived. Raises :class:`WireError` if it makes no sense."""
        if side.peer_closed:
            raise WireError(f"it sent a {kind.name} after it had closed its side")
        if len(self._waiting) >= self._window:
            raise WireError(f"it has more than {2 * self._window} requests at a time")
        request = parse_request(message, kind, self._engine.piece)
        if self._waiting or self._answering >= self._window:
            message = bytearray(memoryview(message).cast("B")) if kind is Kind.WRITE else b""
        expires = time.monotonic() + request.milliseconds / 1000
        self._waiting.append(_Waiting(side, kind, number, request, message, expires))
        self._answer_waiting()

    def _answer_waiting(self) -> None:
        while self._waiting and self._answering < self._window and self.ended is None:
            self._answer(self._waiting.popleft())

    def _answer(self, waiting: _Waiting) -> None:
        """Each request gets exactly one answer."""
        self._answering += 1
        side, request, write = waiting.side, waiting.request, waiting.kind is Kind.WRITE
        refusal = side.refusal(write, request)
        if refusal is None and time.monotonic() > waiting.expires:
            refusal = Refusal.EXPIRED
        if refusal is not None:
            self._reply(waiting, Kind.REFUSED, bytes([refusal]))
        elif write:
            done = side.copy_in(request, waiting.message)
            self._reply(waiting, *((Kind.DONE, b"") if done else _CLOSED))
        elif request.target and self._engine.puts:
            self._put(waiting)
        else:
            message = pack(Kind.DATA, request.reply, waiting.number, room=request.size)
            if side.copy_out(request, message, HEADER_BYTES):
                self._send(message, self._sent_answer)
            else:
                self._reply(waiting, *_CLOSED)

    def _put(self, waiting: _Waiting) -> None:
        data = bytearray(waiting.request.size)
        if not waiting.side.copy_out(waiting.request, data, 0):
            self._reply(waiting, *_CLOSED)
            return
        token = Token(self, lambda: self._reply(waiting, Kind.DONE))
        self._engine_call(token, lambda: self.endpoint.put(data, waiting.request.target, token))

    def _reply(self, waiting: _Waiting, kind: Kind, body: bytes = b"") -> None:
        self._send(pack(kind, waiting.request.reply, waiting.number, body), self._sent_answer)

    def _sent_answer(self) -> None:
        self._answering -= 1
        self._answer_waiting()

    # -- sending ---------------------------------------------------------------------------------

    def greet(self, side: Side) -> None:
        """Tell the peer that its offer was attached."""
        assert side.offer is not None
        self._send(pack(Kind.HELLO, side.offer.secret, body=self.secret))

    def meet(self, secret: bytes) -> None:
        """A side of this session was attached by that session of the peer."""
        if secret and secret not in self._peers:
            self._peers[secret] = False
            if self.retired:
                self._send(pack(Kind.BYE, secret, body=self.secret))

    def retire(self) -> None:
        """It is not used any more: new links get another one.

        The endpoint is closed when the peer's sessions are retired, too. In some engines both endpoints
        are one connection, and the peer may be using it for a new link.
        """
        self.retired = True
        for secret in self._peers:
            self._send(pack(Kind.BYE, secret, body=self.secret))
        self._end_if_unused()

    def take_bye(self, message: Buffer) -> None:
        """A session of the peer is retired. Raises :class:`WireError` if it is none of those."""
        secret = bytes(memoryview(message).cast("B")[HEADER_BYTES:])
        if self._peers.get(secret, True):
            raise WireError("it sent a BYE of a session that is unknown or was ended before")
        self._peers[secret] = True
        self._end_if_unused()

    def _end_if_unused(self) -> None:
        if self.retired and all(self._peers.values()):
            self.end("it is not used any more", lost=False)

    def tell_closed(self, side: Side) -> None:
        """Tell the peer, once, that our side has ended and asks for nothing any more."""
        if side.offer is not None and not side.peer_told:
            side.peer_told = True
            reason = (side.ended or "").encode()[:MAX_REASON]
            self._send(pack(Kind.CLOSED, side.offer.secret, body=reason))

    def _send(self, message: bytearray, then: Callable[[], None] | None = None) -> None:
        token = Token(self, then)
        self._engine_call(token, lambda: self.endpoint.send(message, token))

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
        if token.completed:
            return
        token.completed = True
        self.unsent -= 1
        if error is not None:
            self.end(error, lost=True)
        elif self.ended is None and token.then is not None:
            token.then()

    # -- the end ---------------------------------------------------------------------------------

    def check(self, now: float) -> None:
        """Whether the peer lives and answers; called now and then while :attr:`busy`."""
        problem = self.endpoint.problem()
        if problem is not None:
            self.end(problem, lost=True)
        for asked in self._asked.values():
            if asked.transfer.ended and asked.late_since is None:
                asked.late_since = now
            if asked.late_since is not None and now - asked.late_since > ANSWER_SECONDS:
                limit = in_seconds(ANSWER_SECONDS)
                self.end(f"it did not answer within {limit} after a transfer had ended", lost=True)
                return
        self.advance()

    def end(self, reason: str, lost: bool) -> None:
        """End all sides, and the transfers with them."""
        if self.ended is not None:
            return
        self.ended = reason
        for side in self.sides:
            side.end(reason, lost)
            if not lost:
                self.tell_closed(side)
        for _, target in [*self._landings, *(a.landing for a in self._asked.values() if a.landing)]:
            self._engine.withdraw(target)
        for each in (self._queue, self._asked, self._waiting, self._landings):
            each.clear()
        self._keeper.session_ended(self, lost)


_CLOSED = Kind.REFUSED, bytes([Refusal.CLOSED])


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

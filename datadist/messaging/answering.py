"""The owner's part of a session: requests of the peer, which wait for their turn, and their answers.

At most ``window`` answers have not been sent by the engine, and as many requests wait for that.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from datadist.messaging.engine import Engine
from datadist.messaging.side import Side
from datadist.messaging.wire import (
    HEADER_BYTES,
    Kind,
    Refusal,
    Request,
    WireError,
    pack,
    parse_request,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Answering"]


class Sender(Protocol):
    """What sends answers: the session."""

    ended: str | None

    def send(self, message: bytearray, then: Callable[[], None] | None = None) -> None:
        """Send a message; ``then`` is called when the engine has sent it."""

    def put(self, data: bytearray, target: bytes, then: Callable[[], None]) -> None:
        """Put into a buffer of the peer; ``then`` is called when it is there."""


@dataclass
class _Waiting:
    """A request of the peer's; the message has the data of a write."""

    side: Side
    kind: Kind
    number: int
    request: Request
    message: Buffer
    expires: float


class Answering:
    """See the text of this module."""

    def __init__(
        self, sender: Sender, engine: Engine, window: int, make: Callable[[int], bytearray]
    ) -> None:
        self._make = make
        self._sender = sender
        self._engine = engine
        self._window = window
        self._waiting: deque[_Waiting] = deque()
        self._answering = 0

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
        while self._waiting and self._answering < self._window and self._sender.ended is None:
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
            message = pack(
                Kind.DATA, request.reply, waiting.number, room=request.size, make=self._make
            )
            if side.copy_out(request, message, HEADER_BYTES):
                self._sender.send(message, self._sent_answer)
            else:
                self._reply(waiting, *_CLOSED)

    def _put(self, waiting: _Waiting) -> None:
        data = bytearray(waiting.request.size)
        if waiting.side.copy_out(waiting.request, data, 0):
            self._sender.put(data, waiting.request.target, lambda: self._reply(waiting, Kind.DONE))
        else:
            self._reply(waiting, *_CLOSED)

    def _reply(self, waiting: _Waiting, kind: Kind, body: bytes = b"") -> None:
        message = pack(kind, waiting.request.reply, waiting.number, body)
        self._sender.send(message, self._sent_answer)

    def _sent_answer(self) -> None:
        self._answering -= 1
        self._answer_waiting()

    def clear(self) -> None:
        """The session has ended, or has another endpoint: no answer of before completes any more."""
        self._waiting.clear()
        self._answering = 0


_CLOSED = Kind.REFUSED, bytes([Refusal.CLOSED])

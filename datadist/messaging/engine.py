"""What a plugin implements so that :class:`~datadist.messaging.MessagingTransport` does the rest.

An engine carries messages between processes, as UCX, NIXL and libfabric do. It knows nothing of
memory regions, links and requests: those are the base's.

Rules. The base makes all calls to an engine and its endpoints on one thread of its own, one at a
time; only the constructor, :attr:`Engine.address` and :meth:`Engine.close` may be used from others,
before and after that thread runs. So an engine needs no locks. No call may wait for a peer: each
begins something, and :meth:`Engine.poll` says later that it has completed. Errors are raised as
:class:`EngineError`; they end the session with that peer. Any other exception does so too, and is
logged as a defect of the engine. Only what :meth:`Engine.poll` raises ends the thread, and with it
all links: it concerns no peer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from datadist.messaging.wire import MAX_BESIDE

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "Arrived",
    "Completed",
    "Endpoint",
    "Engine",
    "EngineError",
    "EngineEvent",
    "Lost",
]


class EngineError(Exception):
    """An engine could not begin what was asked; the text says why."""


class Endpoint(ABC):
    """A connection to one peer process, shared by all links with it.

    Messages arrive complete, once, and in the order in which :meth:`send` was called, or the
    connection is lost. A message that the engine loses without saying so costs the session: the
    base ends it after :data:`~datadist.messaging.session.ANSWER_SECONDS`.
    """

    @abstractmethod
    def send(self, message: bytearray, token: object) -> None:
        """Begin to send; at most :attr:`Engine.max_message` bytes.

        The base does not touch ``message`` until :class:`Completed` with this token has come; then it
        may fill it again. That must follow when the engine has handed the message on to the network
        and does not need it any more, and not before: so the base also notices a peer that does not
        take its data.
        """

    def put(self, data: bytearray, target: bytes, token: object) -> None:
        """Begin to write into memory that the peer's engine exposed under ``target``.

        Only for engines with :attr:`Engine.puts`. :class:`Completed` must follow when the bytes are
        in place at the peer.
        """
        raise EngineError("this engine does not put")

    def problem(self) -> str | None:
        """Why the peer cannot be reached any more; None as long as nothing is known against it.

        Called at times while something is under way. Engines that report :class:`Lost` need not
        implement it.
        """
        return None

    @abstractmethod
    def close(self) -> None:
        """Give the connection back, also where the peer is dead. What was not sent may be dropped."""


@dataclass(frozen=True)
class Arrived:
    """A message has arrived; the base is done with it when it asks for the next event."""

    message: Buffer
    source: Endpoint | None = None
    """Our endpoint of the sender, where the engine knows it: then messages that make no sense end the
    session with that peer. None is right too: such messages are dropped then, with a warning."""


@dataclass(frozen=True)
class Completed:
    """A send or put has ended: with success, or with an error that ends the session.

    It may come late, such as on an acknowledgement of the peer: until then what was sent counts in the
    window, and transfers end by their own deadlines. After :class:`Lost` or :meth:`Endpoint.close` it
    need not come; one that comes for the second time is nothing.
    """

    token: object
    error: str | None = None


@dataclass(frozen=True)
class Lost:
    """The engine has noticed that a peer cannot be reached any more. :meth:`Endpoint.close` follows."""

    endpoint: Endpoint
    reason: str


EngineEvent = Arrived | Completed | Lost


class Engine(ABC):
    """One per transport; it listens, and makes endpoints."""

    piece: ClassVar[int] = 1 << 20
    """Most bytes of memory per message, 4096 or more. Both ends use the smaller value of the two."""
    window: ClassVar[int] = 4
    """Most pieces that one process has asked of another and not received. Both ends use the smaller
    value. A peer can make us hold ``window`` pieces, and no more."""
    puts: ClassVar[bool] = False
    """Whether :meth:`Endpoint.put`, :meth:`expose` and :meth:`withdraw` work. Then the data of reads is
    put into buffers of the base, and a message says that it is there."""

    @property
    def max_message(self) -> int:
        """Most bytes of a message: a piece, and what describes it."""
        return self.piece + MAX_BESIDE

    @property
    @abstractmethod
    def address(self) -> bytes:
        """What a peer's :meth:`connect` needs to reach us; at most 64 KiB. It travels with offers."""

    @abstractmethod
    def connect(self, address: bytes) -> Endpoint:
        """Make an endpoint. Does not wait for the peer, which may have ended."""

    @abstractmethod
    def poll(self) -> Iterable[EngineEvent]:
        """Make progress, and return what has happened since the last call: some dozens at most.

        Called until it returns nothing. Then the base waits until :meth:`fileno` is readable, or calls
        again soon where there is none. So an engine whose descriptor must be armed arms it before it
        returns nothing. A peer that is lost is an event: an exception ends the thread of the base, and
        all links.
        """

    def fileno(self) -> int | None:
        """A descriptor that is readable when :meth:`poll` has something to do; asked once.

        With None the base polls, which costs processor time: without a pause until 2 ms after the last
        event, then every millisecond while something is under way, and every 5 ms else. The descriptor
        must notice messages, completions and lost peers.
        """
        return None

    def expose(self, buffer: bytearray) -> bytes:
        """Let peers put into ``buffer``; the name for that, at most 1 KiB, for :meth:`Endpoint.put`.

        What it raises ends the session with the peer that was to put.
        """
        raise EngineError("this engine does not put")

    def withdraw(self, target: bytes) -> None:
        """After this call nothing is written into the buffer exposed under ``target``.

        Called when a session ends. If it raises, the buffer is kept until the engine is closed.
        """
        raise EngineError("this engine does not put")

    @abstractmethod
    def close(self) -> None:
        """Free everything; all endpoints were closed. Bounded to seconds."""

"""A server for engines of other hosts, and the wire's side of connections to it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress

from datadist.control.channel import Handshake, Seals
from datadist.control.hostport import HostPort
from datadist.control.listener import Listener
from datadist.control.messages import Message, encode
from datadist.control.reactor import Reactor
from datadist.control.session import Session
from datadist.control.tcp import NetworkSettings, TcpSession

KEY = b"a key of more than sixteen bytes"
SETTINGS = NetworkSettings(KEY)
LOCAL = HostPort("127.0.0.1", 0)
SECONDS = 20.0


class Server:
    """A listener whose sessions note what they hear, and why they end."""

    def __init__(self, reactor: Reactor) -> None:
        self.received: list[Message] = []
        self.ends: list[str] = []
        self.sessions: list[TcpSession] = []
        self.expected: set[str] = set()
        """Hosts that members are expected from."""
        self._news = threading.Condition()
        self._reactor = reactor
        self.listener = reactor.call(
            lambda: Listener(
                reactor, LOCAL, SETTINGS, self._on_session, self.expected.__contains__
            ),
            SECONDS,
        )

    @property
    def place(self) -> HostPort:
        """Where it listens."""
        return self.listener.endpoint

    def wait(self, condition: Callable[[], object]) -> None:
        """Until the condition holds."""
        with self._news:
            assert self._news.wait_for(condition, SECONDS)

    def refusal(self) -> str:
        """Why it refused the last connection that it hung up on."""
        return self._reactor.call(lambda: self.listener.refusals["127.0.0.1"], SECONDS)

    def close(self) -> None:
        """End listener and sessions."""
        self._reactor.call(self._close, SECONDS)

    def _close(self) -> None:
        with ExitStack() as stack:
            for session in self.sessions:
                stack.callback(session.close, "over")
            stack.callback(self.listener.close)

    def _on_session(self, session: TcpSession) -> None:
        def on_message(_session: Session, message: Message, _fds: list[int]) -> None:
            with self._news:
                self.received.append(message)
                self._news.notify_all()

        def on_closed(_session: Session, reason: str) -> None:
            with self._news:
                self.ends.append(reason)
                self._news.notify_all()

        session.on_message, session.on_closed = on_message, on_closed
        session.start()
        with self._news:
            self.sessions.append(session)
            self._news.notify_all()


def connect(place: HostPort) -> socket.socket:
    """A connection that has said nothing."""
    return socket.create_connection(place, SECONDS)


def prove(sock: socket.socket, step: int | None = None, dialled: bool = True) -> Seals:
    """Go through the handshake, as the one who dialled or was, ``step`` bytes at a time."""
    shake = Handshake(KEY, dialled)
    say = shake.begin()
    while shake.seals is None:
        for start in range(0, len(say), step or max(1, len(say))):
            sock.sendall(say[start : start + (step or len(say))])
        data = sock.recv(min(step or shake.wanted, shake.wanted))
        if not data:
            raise ConnectionAbortedError("refused")
        say = shake.feed(data)
    sock.sendall(say)  # who was dialled speaks last
    return shake.seals


def framed(seals: Seals, message: Message) -> bytes:
    """A message as it goes over the wire."""
    frame = encode(message)
    return frame + seals.sending.next(frame)


def is_closed(sock: socket.socket) -> bool:
    """Whether the other end hangs up, after whatever it says."""
    with suppress(ConnectionResetError):
        while sock.recv(4096):
            pass
    return True

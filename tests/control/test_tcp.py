"""Connections over TCP from the wire's side: strangers, forgers, and those who never finish."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from datadist.control import tcp
from datadist.control.channel import Handshake, Seals
from datadist.control.hostport import HostPort
from datadist.control.listener import (
    MAX_HANDSHAKES,
    MAX_HANDSHAKES_PER_HOST,
    Listener,
    NetworkError,
)
from datadist.control.meeting import Meeting
from datadist.control.messages import (
    HEADER,
    MAX_FRAME,
    WIRE_VERSION,
    Hello,
    Idle,
    Message,
    Welcome,
    decode,
    encode,
)
from datadist.control.reactor import Reactor
from datadist.control.session import Session
from datadist.control.tcp import HANDSHAKE_SECONDS, Dial, NetworkSettings, TcpSession

KEY = b"a key of more than sixteen bytes"
SETTINGS = NetworkSettings(KEY)
LOCAL = HostPort("127.0.0.1", 0)
SECONDS = 20.0


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    """A running reactor."""
    made = Reactor("test")
    yield made
    made.stop()


class Server:
    """A listener whose sessions note what they hear, and why they end."""

    def __init__(self, reactor: Reactor) -> None:
        self.heard: list[Message] = []
        self.ends: list[str] = []
        self.sessions: list[TcpSession] = []
        self._news = threading.Condition()
        self._reactor = reactor
        self.listener = reactor.call(
            lambda: Listener(reactor, LOCAL, SETTINGS, self._on_session), SECONDS
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
        self.listener.close()
        for session in self.sessions:
            session.close("over")

    def _on_session(self, session: TcpSession) -> None:
        def on_message(_session: Session, message: Message, _fds: list[int]) -> None:
            with self._news:
                self.heard.append(message)
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


@pytest.fixture
def server(reactor: Reactor) -> Iterator[Server]:
    """A server at a free port of loopback."""
    made = Server(reactor)
    yield made
    made.close()


def _connect(place: HostPort) -> socket.socket:
    return socket.create_connection(place, SECONDS)


def _prove(sock: socket.socket, step: int | None = None) -> Seals:
    """Go through the handshake as the one who dialled, ``step`` bytes at a time."""
    shake = Handshake(KEY, True)
    say = shake.begin()
    while shake.seals is None:
        for start in range(0, len(say), step or max(1, len(say))):
            sock.sendall(say[start : start + (step or len(say))])
        data = sock.recv(min(step or shake.wanted, shake.wanted))
        if not data:
            raise ConnectionAbortedError("refused")
        say = shake.feed(data)
    return shake.seals


def _framed(seals: Seals, message: Message) -> bytes:
    frame = encode(message)
    return frame + seals.sending.next(frame)


def _is_closed(sock: socket.socket) -> bool:
    """Whether the other end hangs up, after whatever it says."""
    with suppress(ConnectionResetError):
        while sock.recv(4096):
            pass
    return True


@pytest.mark.parametrize(
    "said", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 100, b"datadist-tcp/9\r\n" + b"x" * 32, b"\xff"]
)
def test_a_stranger_learns_nothing_and_is_logged(
    server: Server, said: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "datadist.control"), _connect(server.place) as sock:
        sock.sendall(said)
        with suppress(ConnectionResetError):
            assert sock.recv(100) == b""
    assert "no datadist engine" in server.refusal()
    assert caplog.text.count("refused a connection of 127.0.0.1") == 1
    assert not server.sessions


def test_a_flood_of_strangers_is_one_line(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "datadist.control"):
        for _ in range(50):
            with _connect(server.place) as sock:
                sock.sendall(b"x")
                assert _is_closed(sock)
    assert caplog.text.count("refused a connection") == 1


def test_one_byte_at_a_time_is_understood(server: Server) -> None:
    with _connect(server.place) as sock:
        seals = _prove(sock, step=1)
        for byte in _framed(seals, Welcome()) + _framed(seals, Idle()):
            sock.sendall(bytes([byte]))
        server.wait(lambda: len(server.heard) == 2)
    assert [message.kind for message in server.heard] == ["welcome", "idle"]


def test_those_who_never_finish_are_dropped(server: Server) -> None:
    """Silent, stuck in the greeting, and dripping: each of them for as long as a handshake may."""
    began = time.monotonic()
    silent, stuck, dripping = (_connect(server.place) for _ in range(3))
    stuck.sendall(Handshake(KEY, True).begin()[:40])
    hello = Handshake(KEY, True).begin()
    with suppress(OSError):
        for byte in hello:
            dripping.sendall(bytes([byte]))
            time.sleep(HANDSHAKE_SECONDS / (len(hello) - 8))
    for sock in (silent, stuck, dripping):
        with sock:
            assert _is_closed(sock)
    assert time.monotonic() - began >= HANDSHAKE_SECONDS
    assert not server.sessions
    with _connect(server.place) as sock:
        _prove(sock)


def _stranger(place: HostPort, host: int) -> socket.socket:
    """Connects from 127.0.0.``host``, and says nothing."""
    return socket.create_connection(place, SECONDS, source_address=(f"127.0.0.{host}", 0))


@pytest.mark.parametrize("hosts", [1, MAX_HANDSHAKES // MAX_HANDSHAKES_PER_HOST + 2])
def test_strangers_who_hold_all_places_keep_no_engine_out(
    server: Server, hosts: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither of their own host nor of another one, and not only once their time is over."""
    with caplog.at_level(logging.WARNING, "datadist.control"), ExitStack() as crowd:
        held = [
            crowd.enter_context(_stranger(server.place, host + 1))
            for _ in range(2 * MAX_HANDSHAKES_PER_HOST)
            for host in range(hosts)
        ]
        for host in (1, 99):
            with _stranger(server.place, host) as sock:
                _prove(sock)
        server.wait(lambda: len(server.sessions) == 2)
        assert _is_closed(held[0])
    assert "have proved nothing" in caplog.text


def test_the_crowd_of_one_host_is_at_its_own_expense(server: Server) -> None:
    with ExitStack() as crowd:
        slow = crowd.enter_context(_stranger(server.place, 99))
        shake = Handshake(KEY, True)
        slow.sendall(shake.begin())
        for _ in range(3 * MAX_HANDSHAKES_PER_HOST):
            crowd.enter_context(_stranger(server.place, 1))
        while shake.seals is None:
            slow.sendall(shake.feed(slow.recv(shake.wanted)) or b"")
        server.wait(lambda: server.sessions)


def test_a_flood_delays_an_engine_and_does_not_keep_it_out(server: Server) -> None:
    """Strangers of its host who come again at once, each time that they are shown out."""
    over = threading.Event()

    def flood() -> None:
        while not over.is_set():
            with suppress(OSError), _stranger(server.place, 1) as sock:
                sock.settimeout(0.5)
                sock.recv(1)

    strangers = [threading.Thread(target=flood) for _ in range(2 * MAX_HANDSHAKES_PER_HOST)]
    for stranger in strangers:
        stranger.start()
    try:
        deadline = time.monotonic() + SECONDS
        while not server.sessions:
            assert time.monotonic() < deadline
            with suppress(OSError), _stranger(server.place, 1) as sock:
                _prove(sock)
                server.wait(lambda: server.sessions)
    finally:
        over.set()
        for stranger in strangers:
            stranger.join()


@pytest.mark.parametrize("how", ["replayed", "changed", "swapped", "unsealed"])
def test_a_forged_frame_ends_the_session(server: Server, how: str) -> None:
    with _connect(server.place) as sock:
        seals = _prove(sock)
        first, second = _framed(seals, Welcome()), _framed(seals, Idle())
        bodies = {
            "replayed": first + first,
            "changed": first + second[:10] + bytes([second[10] ^ 1]) + second[11:],
            "swapped": second + first,
            "unsealed": first + encode(Idle()) + bytes(32),
        }
        sock.sendall(bodies[how])
        assert _is_closed(sock)
    server.wait(lambda: server.ends)
    assert "MAC" in server.ends[0]
    assert [m.kind for m in server.heard] == ([] if how == "swapped" else ["welcome"])


def test_a_length_that_is_too_large_is_not_waited_for(server: Server) -> None:
    with _connect(server.place) as sock:
        _prove(sock)
        sock.sendall(HEADER.pack(MAX_FRAME + 1))
        assert _is_closed(sock)
    server.wait(lambda: server.ends)
    assert str(MAX_FRAME) in server.ends[0]


def test_a_connection_cut_within_a_frame(server: Server) -> None:
    with _connect(server.place) as sock:
        sock.sendall(_framed(_prove(sock), Welcome())[:-5])
    server.wait(lambda: server.ends)
    assert "closed the connection" in server.ends[0]
    assert not server.heard


def test_a_port_that_is_taken_and_an_address_that_is_foreign(
    reactor: Reactor, server: Server
) -> None:
    with pytest.raises(NetworkError, match="another process uses this port"):
        reactor.call(lambda: Listener(reactor, server.place, SETTINGS, lambda _s: None), SECONDS)
    foreign = HostPort("192.0.2.1", 0)
    with pytest.raises(NetworkError, match="no such address"):
        reactor.call(lambda: Listener(reactor, foreign, SETTINGS, lambda _s: None), SECONDS)


def test_nothing_is_left_open(reactor: Reactor) -> None:
    before = set(os.listdir("/proc/self/fd"))
    server = Server(reactor)
    with _connect(server.place) as proved, _connect(server.place) as silent:
        _prove(proved)
        server.wait(lambda: server.sessions)
        server.close()
        assert _is_closed(proved)
        assert _is_closed(silent)
    assert set(os.listdir("/proc/self/fd")) == before


class _Program:
    """Another program at a port: it answers a connection with some bytes, or only hangs up."""

    def __init__(self, answer: bytes | None) -> None:
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.place = HostPort("127.0.0.1", self._sock.getsockname()[1])
        self._answer = answer
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        sock, _ = self._sock.accept()
        with sock:
            if self._answer:
                sock.sendall(self._answer)
                sock.recv(100)

    def close(self) -> None:
        self._thread.join(SECONDS)
        self._sock.close()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(b"220 mail ready\r\n", "no datadist engine"), (None, "without a word")],
)
def test_dialling_another_program(reactor: Reactor, answer: bytes | None, expected: str) -> None:
    program, came = _Program(answer), threading.Event()
    reasons: list[str] = []

    def failed(reason: str) -> None:
        reasons.append(reason)
        came.set()

    reactor.call(
        lambda: Dial(reactor, program.place, SETTINGS, lambda _s: came.set(), failed), SECONDS
    )
    assert came.wait(SECONDS)
    program.close()
    assert expected in reasons[0]


def test_the_next_address_of_a_name_is_tried(
    reactor: Reactor, server: Server, free_ports: Callable[[int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also where it turns out only later that nobody answers at the first one."""
    (dead,) = free_ports(1)
    addresses = [(socket.AF_INET, ("127.0.0.1", port)) for port in (dead, server.place.port)]
    monkeypatch.setattr(tcp, "look_up", lambda _reactor, _place, found, _failed: found(addresses))
    met: list[object] = []
    came = threading.Event()

    def ended(what: object) -> None:
        met.append(what)
        came.set()

    reactor.call(lambda: Dial(reactor, LOCAL, SETTINGS, ended, ended), SECONDS)
    assert came.wait(SECONDS)
    (session,) = met
    assert isinstance(session, TcpSession)
    reactor.call(lambda: session.close("over"), SECONDS)


@pytest.mark.parametrize("seconds", [2, 10, 600])
def test_the_kernel_gives_a_silent_host_up_in_time(seconds: int) -> None:
    with socket.socket() as sock:
        tcp._keep_alive(sock, float(seconds))
        kind = socket.IPPROTO_TCP
        assert sock.getsockopt(kind, socket.TCP_USER_TIMEOUT) == 1000 * seconds
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
            assert 1 <= sock.getsockopt(kind, option) <= seconds / 2
        assert sock.getsockopt(kind, socket.TCP_NODELAY)


# -- as the meeting place sees it ----------------------------------------------------------------


@pytest.fixture
def meeting(reactor: Reactor, runtime_dir: Path) -> Iterator[Meeting]:
    """A meeting place."""
    made = reactor.call(lambda: Meeting(reactor, 1, runtime_dir, SETTINGS), SECONDS)
    yield made
    reactor.call(made.close, SECONDS)


@pytest.fixture
def place(reactor: Reactor, meeting: Meeting) -> HostPort:
    """Where it listens."""
    assert meeting.remote is not None
    remote = meeting.remote
    return reactor.call(lambda: remote.listen(LOCAL), SECONDS).endpoint


def _hello(**changes: object) -> Hello:
    return Hello(wire=WIRE_VERSION, incarnation="f" * 32, cluster_id=2).model_copy(update=changes)


def _answer(sock: socket.socket) -> Message:
    (size,) = HEADER.unpack(sock.recv(HEADER.size, socket.MSG_WAITALL))
    return decode(sock.recv(size + 32, socket.MSG_WAITALL)[:size])


def test_saying_hello_and_welcome_makes_a_session(place: HostPort, meeting: Meeting) -> None:
    with _connect(place) as sock:
        seals = _prove(sock)
        sock.sendall(_framed(seals, _hello()))
        answer = _answer(sock)
        assert isinstance(answer, Hello)
        assert answer.incarnation == meeting.address.incarnation
        assert not meeting.sessions
        sock.sendall(_framed(seals, Welcome()))
        assert _answer(sock).kind == "idle"
        assert list(meeting.sessions) == ["f" * 32]


@pytest.mark.parametrize("first", [Idle(), Welcome(), None])
def test_who_does_not_say_hello_is_dropped(
    place: HostPort, meeting: Meeting, first: Message | None
) -> None:
    with _connect(place) as sock:
        seals = _prove(sock)
        if first is not None:
            sock.sendall(_framed(seals, first))
        assert _is_closed(sock)
    assert not meeting.sessions


def test_another_release_is_told_ours(
    place: HostPort, meeting: Meeting, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "datadist.control"), _connect(place) as sock:
        sock.sendall(_framed(_prove(sock), _hello(wire=WIRE_VERSION + 1)))
        answer = _answer(sock)
        assert isinstance(answer, Hello)
        assert answer.wire == WIRE_VERSION
        assert _is_closed(sock)
    assert "install the same datadist release" in caplog.text
    assert not meeting.sessions

"""Connections over TCP from the wire's side: forgers, cuts, ports, and who is dialled."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

import pytest

from datadist.control import tcp
from datadist.control.hostport import HostPort
from datadist.control.listener import Listener, NetworkError
from datadist.control.messages import HEADER, MAX_FRAME, Idle, Welcome, encode
from datadist.control.reactor import Reactor
from datadist.control.tcp import Dial, TcpSession
from tests import descriptors
from tests.tcp_server import LOCAL, SECONDS, SETTINGS, Server, connect, framed, is_closed, prove


def test_one_byte_at_a_time_is_understood(server: Server) -> None:
    with connect(server.place) as sock:
        seals = prove(sock, step=1)
        for byte in framed(seals, Welcome()) + framed(seals, Idle()):
            sock.sendall(bytes([byte]))
        server.wait(lambda: len(server.received) == 2)
    assert [message.kind for message in server.received] == ["welcome", "idle"]


@pytest.mark.parametrize("how", ["replayed", "changed", "swapped", "unsealed"])
def test_a_forged_frame_ends_the_session(server: Server, how: str) -> None:
    with connect(server.place) as sock:
        seals = prove(sock)
        first, second = framed(seals, Welcome()), framed(seals, Idle())
        bodies = {
            "replayed": first + first,
            "changed": first + second[:10] + bytes([second[10] ^ 1]) + second[11:],
            "swapped": second + first,
            "unsealed": first + encode(Idle()) + bytes(32),
        }
        sock.sendall(bodies[how])
        assert is_closed(sock)
    server.wait(lambda: server.ends)
    assert "MAC" in server.ends[0]
    assert [m.kind for m in server.received] == ([] if how == "swapped" else ["welcome"])


def test_a_length_that_is_too_large_is_not_waited_for(server: Server) -> None:
    with connect(server.place) as sock:
        prove(sock)
        sock.sendall(HEADER.pack(MAX_FRAME + 1))
        assert is_closed(sock)
    server.wait(lambda: server.ends)
    assert str(MAX_FRAME) in server.ends[0]


def test_a_connection_cut_within_a_frame(server: Server) -> None:
    with connect(server.place) as sock:
        sock.sendall(framed(prove(sock), Welcome())[:-5])
    server.wait(lambda: server.ends)
    assert "closed the connection" in server.ends[0]
    assert not server.received


def test_a_port_that_is_taken_and_an_address_that_is_foreign(
    reactor: Reactor, server: Server
) -> None:
    with pytest.raises(NetworkError, match="another process uses this port"):
        reactor.call(lambda: Listener(reactor, server.place, SETTINGS, lambda _s: None), SECONDS)
    foreign = HostPort("192.0.2.1", 0)
    with pytest.raises(NetworkError, match="no such address"):
        reactor.call(lambda: Listener(reactor, foreign, SETTINGS, lambda _s: None), SECONDS)


def test_nothing_is_left_open(reactor: Reactor) -> None:
    before = descriptors.count()
    server = Server(reactor)
    with connect(server.place) as proved, connect(server.place) as silent:
        prove(proved)
        server.wait(lambda: server.sessions)
        server.close()
        assert is_closed(proved)
        assert is_closed(silent)
    assert descriptors.falls_to(before)


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
    [(b"220 mail ready\r\n", "no datadist engine"), (None, "without an answer")],
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

"""Connections over TCP that prove nothing: they learn nothing, and keep no engine out."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial

import pytest

from datadist.control import listener
from datadist.control.channel import Handshake
from datadist.control.hostport import HostPort
from datadist.control.tcp import HANDSHAKE_SECONDS
from tests.crowd import KINDS, Connections
from tests.nodes import Here, Node
from tests.tcp_server import KEY, SECONDS, Server, connect, is_closed, prove

PLACES = 64


@pytest.fixture(autouse=True)
def few_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many there are depends on the limit of descriptors."""
    monkeypatch.setattr(listener, "MAX_HANDSHAKES", PLACES)


@pytest.mark.parametrize(
    "said", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 100, b"datadist-tcp/9\r\n" + b"x" * 32, b"\xff"]
)
def test_a_stranger_learns_nothing_and_is_logged(
    server: Server, said: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "datadist.control"), connect(server.place) as sock:
        sock.sendall(said)
        with suppress(ConnectionResetError):
            assert sock.recv(100) == b""
    assert "no datadist engine" in server.refusal()
    assert caplog.text.count("refused a connection of 127.0.0.1") == 1
    assert not server.sessions


def test_a_flood_of_strangers_is_one_line(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "datadist.control"):
        for _ in range(50):
            with connect(server.place) as sock:
                sock.sendall(b"x")
                assert is_closed(sock)
    assert caplog.text.count("refused a connection") == 1


def test_those_who_never_finish_are_dropped(server: Server) -> None:
    """Silent, stuck in the greeting, and dripping: each of them for as long as a handshake may."""
    began = time.monotonic()
    silent, stuck, dripping = (connect(server.place) for _ in range(3))
    stuck.sendall(Handshake(KEY, True).begin()[:40])
    hello = Handshake(KEY, True).begin()
    with suppress(OSError):
        for byte in hello:
            dripping.sendall(bytes([byte]))
            time.sleep(HANDSHAKE_SECONDS / (len(hello) - 8))
    for sock in (silent, stuck, dripping):
        with sock:
            assert is_closed(sock)
    assert time.monotonic() - began >= HANDSHAKE_SECONDS
    assert not server.sessions
    with connect(server.place) as sock:
        prove(sock)


def _unauthenticated(place: HostPort, host: int) -> socket.socket:
    """Connects from 127.0.0.``host``, and says nothing."""
    return socket.create_connection(place, SECONDS, source_address=(f"127.0.0.{host}", 0))


@pytest.mark.parametrize("hosts", [1, 6])
def test_strangers_who_hold_all_places_keep_no_engine_out(
    server: Server, hosts: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither of their own host nor of another one, and not only once their time is over."""
    with caplog.at_level(logging.WARNING, "datadist.control"), ExitStack() as crowd:
        held = [
            crowd.enter_context(_unauthenticated(server.place, host + 1))
            for _ in range(2 * PLACES // hosts)
            for host in range(hosts)
        ]
        for host in (1, 99):
            with _unauthenticated(server.place, host) as sock:
                prove(sock)
        server.wait(lambda: len(server.sessions) == 2)
        assert is_closed(held[0])
    assert "connections that have proved nothing" in caplog.text


def test_the_crowd_of_one_host_is_at_its_own_expense(server: Server) -> None:
    with ExitStack() as crowd:
        slow = crowd.enter_context(_unauthenticated(server.place, 99))
        shake = Handshake(KEY, True)
        slow.sendall(shake.begin())
        for _ in range(2 * PLACES):
            crowd.enter_context(_unauthenticated(server.place, 1))
        while shake.seals is None:
            slow.sendall(shake.feed(slow.recv(shake.wanted)) or b"")
        server.wait(lambda: server.sessions)


def test_a_flood_delays_an_engine_and_does_not_keep_it_out(server: Server) -> None:
    """Strangers of its host who come again at once, each time that they are disconnected."""
    over = threading.Event()

    def flood() -> None:
        while not over.is_set():
            with suppress(OSError), _unauthenticated(server.place, 1) as sock:
                sock.settimeout(0.5)
                sock.recv(1)

    senders = [threading.Thread(target=flood) for _ in range(32)]
    for sender in senders:
        sender.start()
    try:
        deadline = time.monotonic() + SECONDS
        while not server.sessions:
            assert time.monotonic() < deadline
            with suppress(OSError), _unauthenticated(server.place, 1) as sock:
                prove(sock)
                server.wait(lambda: server.sessions)
    finally:
        over.set()
        for sender in senders:
            sender.join()


# -- a crowd of many hosts ---------------------------------------------------------------------

HOSTS, EACH = 300, 3


def _start(start_node: Callable[..., Node], place: HostPort, kinds: tuple[str, ...]) -> Node:
    """A process with strangers from so many addresses; all of them have come when it returns."""
    node = start_node()
    node.do(_begin, place, kinds)
    return node


def _begin(here: Here, place: HostPort, kinds: tuple[str, ...]) -> None:
    here.any["crowd"] = Connections(place, HOSTS, EACH, kinds)
    assert here.any["crowd"].settled.wait(SECONDS)


def _has_sessions(server: Server, count: int) -> bool:
    return len(server.sessions) == count


def _tries(here: Here) -> int:
    return int(here.any["crowd"].tries.total())


@pytest.mark.parametrize("kinds", [(kind,) for kind in KINDS[:3]] + [KINDS[:3]])
def test_an_engine_gets_in_at_once_whatever_crowd_of_hosts_there_is(
    server: Server, start_node: Callable[..., Node], kinds: tuple[str, ...]
) -> None:
    """With its first connection, among those who come again as soon as they are disconnected.

    Some may be refused: this process may not run while as many come as may wait. So this test may pass
    where those who have greeted go before others do: test_listener.py looks at that without a crowd.
    """
    crowd = _start(start_node, server.place, kinds)
    came, refused = crowd.do(_tries), 0
    for number in range(1, 11):
        while True:
            with _unauthenticated(server.place, 1) as sock, suppress(ConnectionError):
                prove(sock)
                server.wait(partial(_has_sessions, server, number))
                break
            refused += 1
            assert refused <= 5, "refused again and again"
    assert crowd.do(_tries) > came, "they did not come again"


def test_an_engine_of_an_expected_host_gets_in_among_those_who_know_the_protocol(
    server: Server, start_node: Callable[..., Node]
) -> None:
    server.expected.add("127.0.0.1")
    _start(start_node, server.place, KINDS)
    for number in range(1, 11):
        with _unauthenticated(server.place, 1) as sock:
            prove(sock)
            server.wait(partial(_has_sessions, server, number))

"""How many connections may be proving themselves at a listener, and which has to go (listener.py)."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import pytest

from datadist.control import listener
from datadist.control.channel import Handshake
from datadist.control.hostport import HostPort
from datadist.control.listener import (
    ACCEPTS_PER_TURN,
    Listener,
)
from datadist.control.reactor import Reactor
from datadist.control.tcp import Authentication, NetworkSettings
from tests.waiting import until

KEY = b"a key of more than sixteen bytes"
SECONDS = 20.0
PLACES = 64


class Connections:
    """Connections to a listener, from addresses of loopback, that prove nothing."""

    def __init__(self, reactor: Reactor, stack: ExitStack) -> None:
        self._stack = stack
        self._reactor = reactor
        self.sockets: list[socket.socket] = []
        self.expected: set[str] = set()
        settings = NetworkSettings(KEY)
        self.listener = reactor.call(
            lambda: Listener(
                reactor,
                HostPort("127.0.0.1", 0),
                settings,
                lambda _: None,
                self.expected.__contains__,
            ),
            SECONDS,
        )

    def join(self, host: int, count: int) -> None:
        """Connect from the address of that number."""
        for _ in range(count):
            sock = socket.create_connection(
                self.listener.endpoint,
                SECONDS,
                source_address=(f"127.0.{host >> 8}.{host & 255}", 0),
            )
            self.sockets.append(self._stack.enter_context(sock))

    def closed(self, least: int) -> list[int]:
        """Which were closed, by the order in which they came; waits for so many."""
        deadline = time.monotonic() + SECONDS
        while len(found := self._closed_now()) < least and time.monotonic() < deadline:
            time.sleep(0.01)
        return found

    def _closed_now(self) -> list[int]:
        readable = select.select(self.sockets, [], [], 0)[0]
        return [place for place, sock in enumerate(self.sockets) if sock in readable]

    def refusals(self) -> dict[str, str]:
        return self._reactor.call(lambda: dict(self.listener.refusals.items()), SECONDS)

    def waiting(self) -> int:
        """How many have a place; on the reactor's thread."""
        return len(list(self.listener._strangers))

    def wake(self) -> None:
        """Look now whether more may come."""
        self._reactor.call(self.listener._resume, SECONDS)

    def close(self) -> None:
        self._reactor.call(self.listener.close, SECONDS)


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch, reactor: Reactor) -> Iterator[Connections]:
    monkeypatch.setattr(listener, "MAX_HANDSHAKES", PLACES)
    # nobody is spared for a moment, which on a slow machine is over for some and not for others
    for name in ("GREETING_SECONDS", "PROOF_SECONDS"):
        monkeypatch.setattr(listener, name, 0.0)
    # none goes because its time is over
    monkeypatch.setattr(listener, "Authentication", partial(Authentication, seconds=600.0))
    with ExitStack() as stack:
        made = Connections(reactor, stack)
        yield made
        made.close()


def test_all_together_have_so_many_places(connections: Connections) -> None:
    connections.join(1, PLACES + 1)
    assert connections.closed(1) == [0]
    assert connections.refusals() == {
        "127.0.0.1": f"it was the oldest of {PLACES} connections that have proved nothing"
    }
    connections.join(2, 2)
    assert connections.closed(3) == [0, 1, 2]


def test_the_host_with_most_connections_makes_room(connections: Connections) -> None:
    connections.join(1, 1)
    connections.join(2, 3)
    for host in range(3, PLACES - 1):
        connections.join(host, 1)
    connections.join(4, 1)
    assert connections.closed(1) == [1]
    connections.join(998, 1)
    assert len(connections.closed(2)) == 2
    connections.join(999, 1)
    assert {1, 2} < set(connections.closed(3))


def test_who_has_greeted_stays_when_one_has_to_go(connections: Connections) -> None:
    """Also where its host has most connections, and it is the oldest."""
    connections.join(1, 2)
    for sock in connections.sockets:
        sock.sendall(Handshake(KEY, True).begin())
        assert sock.recv(100)
    for host in range(2, PLACES):
        connections.join(host, 1)
    for host in range(1000, 1003):
        connections.join(host, 1)
    assert connections.closed(3) == [2, 3, 4]


@pytest.mark.parametrize("greeted", [False, True])
def test_strangers_never_cost_an_expected_host_its_places(
    connections: Connections, greeted: bool
) -> None:
    connections.expected.add("127.0.0.1")
    connections.join(1, 16)
    strangers = range(2, PLACES + 10)
    for host in strangers:
        connections.join(host, 1)
        if greeted:
            connections.sockets[-1].sendall(Handshake(KEY, True).begin())
            assert connections.sockets[-1].recv(100)
    most = len(strangers) - PLACES
    first = 16
    assert connections.closed(most) == list(range(first, first + most))
    connections.join(1, PLACES - 16 + 1)
    assert connections.closed(most + 1)[0] == 0


def test_who_has_just_come_is_not_shown_out(
    connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others wait in the kernel's queue meanwhile, and come in later."""
    monkeypatch.setattr(listener, "GREETING_SECONDS", 600.0)
    connections.join(1, PLACES + 5)
    time.sleep(0.3)  # some looks at whether more may come
    assert connections.closed(0) == []
    monkeypatch.setattr(listener, "GREETING_SECONDS", 0.0)
    connections.wake()
    assert connections.closed(5) == [0, 1, 2, 3, 4]


def test_a_turn_accepts_so_many(connections: Connections, reactor: Reactor) -> None:
    """Then others have theirs; the rest comes in later."""
    held, go, seen = threading.Event(), threading.Event(), list[int]()

    def block() -> None:
        held.set()
        go.wait(SECONDS)

    reactor.post(block)
    assert held.wait(SECONDS)
    for host in range(1, 5):
        connections.join(host, 16)
    reactor.post(lambda: seen.append(connections.waiting()))
    go.set()
    deadline = time.monotonic() + SECONDS
    while reactor.call(connections.waiting, SECONDS) < PLACES:
        assert time.monotonic() < deadline
    assert 0 <= seen[0] <= ACCEPTS_PER_TURN


def test_who_greeted_while_the_thread_was_busy_does_not_go_as_a_silent_one(
    connections: Connections, reactor: Reactor
) -> None:
    """Its greeting lies there when the next one comes, and the thread looks at that one first."""
    held, go = threading.Event(), threading.Event()

    def block() -> None:
        held.set()
        go.wait(SECONDS)

    connections.join(1, PLACES)
    until(lambda: reactor.call(connections.waiting, SECONDS) == PLACES)
    reactor.post(block)
    assert held.wait(SECONDS)
    connections.join(2, 1)
    first = connections.sockets[0]
    first.sendall(Handshake(KEY, True).begin())
    go.set()
    assert first.recv(100), "it was disconnected"
    assert connections.closed(1) == [1]

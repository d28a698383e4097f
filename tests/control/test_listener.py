"""How many connections may be proving themselves at a listener, and which has to go (listener.py)."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace

import pytest

from datadist.control import listener
from datadist.control.hostport import HostPort
from datadist.control.listener import (
    ACCEPTS_PER_SECOND,
    MAX_HANDSHAKES,
    MAX_HANDSHAKES_PER_HOST,
    Listener,
)
from datadist.control.reactor import Reactor
from datadist.control.tcp import NetworkSettings, Proving

SECONDS = 20.0


class Crowd:
    """Connections to a listener, from addresses of loopback, that prove nothing."""

    def __init__(self, reactor: Reactor, stack: ExitStack) -> None:
        self._stack = stack
        self._reactor = reactor
        self.sockets: list[socket.socket] = []
        settings = NetworkSettings(b"a key of more than sixteen bytes")
        self.listener = reactor.call(
            lambda: Listener(reactor, HostPort("127.0.0.1", 0), settings, lambda _: None), SECONDS
        )

    def join(self, host: int, count: int) -> None:
        """Connect from 127.0.0.``host``."""
        for _ in range(count):
            sock = socket.create_connection(
                self.listener.endpoint, SECONDS, source_address=(f"127.0.0.{host}", 0)
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
        return self._reactor.call(lambda: dict(self.listener.refusals), SECONDS)

    def close(self) -> None:
        self._reactor.call(self.listener.close, SECONDS)


@pytest.fixture
def crowd(monkeypatch: pytest.MonkeyPatch) -> Iterator[Crowd]:
    # none goes because its time is over
    monkeypatch.setattr(listener, "Proving", partial(Proving, seconds=600.0))
    reactor = Reactor("test")
    with ExitStack() as stack:
        made = Crowd(reactor, stack)
        yield made
        made.close()
    reactor.stop()


def test_one_host_has_so_many_places(crowd: Crowd) -> None:
    crowd.join(1, MAX_HANDSHAKES_PER_HOST + 1)
    assert crowd.closed(1) == [0]
    assert crowd.refusals() == {
        "127.0.0.1": f"it was the eldest of {MAX_HANDSHAKES_PER_HOST} connections that have proved "
        "nothing"
    }
    crowd.join(1, 2)
    assert crowd.closed(3) == [0, 1, 2]


def test_all_hosts_together_have_so_many_places(crowd: Crowd) -> None:
    hosts = MAX_HANDSHAKES // MAX_HANDSHAKES_PER_HOST
    for host in range(1, hosts + 1):
        crowd.join(host, MAX_HANDSHAKES_PER_HOST)
    crowd.join(hosts + 1, 1)
    assert crowd.closed(1) == [0]
    (reason,) = crowd.refusals().values()
    assert f"the eldest of {MAX_HANDSHAKES} connections" in reason


def test_the_host_with_most_connections_makes_room(crowd: Crowd) -> None:
    few = MAX_HANDSHAKES_PER_HOST - 1
    hosts = MAX_HANDSHAKES // few
    for host in range(1, hosts + 1):
        crowd.join(host, few)
    crowd.join(9, MAX_HANDSHAKES - hosts * few)
    crowd.join(hosts, 1)
    eldest_of_the_largest = crowd.closed(1)
    assert eldest_of_the_largest == [0]
    crowd.join(9, 1)
    assert crowd.closed(2) == [0, (hosts - 1) * few]


def test_no_more_are_accepted_in_a_second(crowd: Crowd, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them wait in the kernel, and come in when their time has come."""
    now = [time.monotonic()]
    monkeypatch.setattr(listener, "time", SimpleNamespace(monotonic=lambda: now[0]))
    for host in range(1, 9):
        crowd.join(host, ACCEPTS_PER_SECOND // 8 + 5)
    first = ACCEPTS_PER_SECOND - MAX_HANDSHAKES  # those that made room for the others
    assert len(crowd.closed(first)) == first
    time.sleep(0.3)  # some looks at whether more may come
    assert len(crowd.closed(first)) == first
    now[0] += 10.5 / ACCEPTS_PER_SECOND
    assert len(crowd.closed(first + 10)) == first + 10
    time.sleep(0.3)
    assert len(crowd.closed(first)) == first + 10

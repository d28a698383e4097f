"""What links with one peer share, where calls of the transport hang or others come between them."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from datadist.links import peer_connections
from datadist.links.peer_connections import PeerConnections
from datadist.links.steps import Steps
from datadist.transport import Group, Peer


class _Told:
    """A transport whose :meth:`connect` waits at a gate, where there is one."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.gate.set()

    def connect(self, peer: Peer) -> str:
        self.entered.set()
        assert self.gate.wait(60)
        self.events.append("connect")
        return peer.incarnation

    def disconnect(self, _peer: Peer) -> None:
        self.events.append("disconnect")

    def peer_lost(self, _peer: Peer) -> None:
        self.events.append("lost")


def _connections(transport: _Told) -> PeerConnections:
    return PeerConnections(cast("Any", transport), lambda call: call())


def _attempt() -> Any:
    return SimpleNamespace(
        forcing=threading.Lock(), closed=False, dead=False, connections=[], processes=[]
    )


def _group() -> Group:
    return Group("pair", 0, {0: Peer(0, "us"), 1: Peer(1, "them")}, None, time.monotonic() + 60)


def test_a_loss_is_told_also_while_a_link_gives_back_what_others_use() -> None:
    transport = _Told()
    connections, first, second = _connections(transport), _attempt(), _attempt()
    connections.connect(first, _group())
    connections.connect(second, _group())
    lock = first.connections[0].lock

    class Lossy:
        """A lock during whose first hold the peer is lost."""

        def acquire(self, *args: Any, **kwargs: Any) -> bool:
            return bool(lock.acquire(*args, **kwargs))

        def release(self) -> None:
            lock.release()

        __enter__ = acquire

        def __exit__(self, *_: object) -> None:
            if "lost" not in transport.events:
                connections.on_lost("them")
            lock.release()

    first.connections[0].lock = Lossy()
    connections.disconnect(first)
    connections.on_lost("them")
    assert transport.events == ["connect", "lost"]
    connections.disconnect(second)
    assert transport.events == ["connect", "lost", "disconnect"]


def test_the_end_does_not_wait_for_a_transport_that_does_not_come_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(peer_connections, "CLOSE_SECONDS", 0.1)
    transport = _Told()
    transport.gate.clear()
    connections, attempt = _connections(transport), _attempt()
    connecting = threading.Thread(target=connections.connect, args=(attempt, _group()))
    connecting.start()
    assert transport.entered.wait(60)
    connections.close()
    assert "has not come back from connecting to rank 1" in caplog.text
    transport.gate.set()
    connecting.join(60)
    connections.disconnect(attempt)
    assert transport.events == ["connect", "disconnect"]


def test_who_comes_while_the_last_one_leaves_keeps_or_renews_the_connection() -> None:
    transport = _Told()
    connections = _connections(transport)
    stop = time.monotonic() + 1.0

    def come_and_go() -> None:
        while time.monotonic() < stop:
            attempt = _attempt()
            group = connections.connect(attempt, _group())
            assert group.peers[1].connection == "them"
            connections.disconnect(attempt)

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    pairs = len(transport.events) // 2
    assert pairs > 0
    assert transport.events == ["connect", "disconnect"] * pairs
    assert not connections._all
    assert not connections._current


def test_a_link_that_came_just_before_its_attempt_was_closed_is_closed_first() -> None:
    """Opening ended on one thread while another closed the attempt, which had no link then."""
    transport = _Told()
    steps = Steps.__new__(Steps)
    steps.connections = _connections(transport)
    concealed: list[list[int]] = []
    steps._memory = cast(
        "Any", SimpleNamespace(conceal=lambda regions, _attempt: concealed.append(regions))
    )
    attempt = _attempt()
    attempt.regions = [3]
    steps.connections.connect(attempt, _group())
    attempt.link = SimpleNamespace(close=lambda: transport.events.append("close"))
    steps._end_late(attempt)
    assert transport.events == ["connect", "close", "disconnect"]
    assert attempt.regions == []
    assert concealed == [[3]]

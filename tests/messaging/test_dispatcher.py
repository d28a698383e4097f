"""Faults of engines and peers end one session, and leave nothing in the tables."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import cast

import pytest

from datadist.messaging import EngineError, dispatcher, loop, session
from datadist.messaging.dispatcher import Dispatcher
from datadist.messaging.link import MessagingLink
from datadist.messaging.wire import Kind
from datadist.transport import LinkError, Offer, Peer, PeerLost, TransferError
from tests.descriptors import is_open
from tests.messaging_links import (
    FAR,
    Node,
    attach_links,
    late_write,
    linked,
    nodes,
    open_links,
    stuck,
    until,
    whole,
)
from tests.pair_engine import PuttingTransport


def _dispatcher(node: Node) -> Dispatcher:
    return node.transport._dispatcher


def _raise(*_: object) -> object:
    raise EngineError("the device is gone")


def _defect(*_: object) -> object:
    raise ValueError("a defect")


Break = Callable[..., object]


@pytest.mark.parametrize("fault", [_raise, _defect], ids=["error", "defect"])
def test_a_buffer_that_cannot_be_exposed_costs_one_session(fault: Break) -> None:
    with (
        nodes(3, kinds=[PuttingTransport]) as (mine, first, second),
        linked([mine, first]) as (link, _),
        linked([mine, second]) as (other, _),
    ):
        other.read(1, *whole(mine, second, 64), FAR)
        mine.on_thread(lambda: setattr(mine.transport.engine, "expose", fault))
        with pytest.raises(TransferError, match="gone" if fault is _raise else "a defect"):
            link.read(1, *whole(mine, first), FAR)
        other.read(1, *whole(mine, second, 64), FAR)


@pytest.mark.parametrize("fault", [_raise, _defect], ids=["error", "defect"])
def test_a_buffer_that_is_not_withdrawn_is_kept(fault: Break) -> None:
    with (
        nodes(3, kinds=[PuttingTransport]) as (mine, first, second),
        linked([mine, first]) as (link, _),
        linked([mine, second]) as (other, _),
    ):
        link.read(1, *whole(mine, first, 64), FAR)
        other.read(1, *whole(mine, second, 64), FAR)
        mine.on_thread(lambda: setattr(mine.transport.engine, "withdraw", fault))
        mine.transport.peer_lost(Peer(1, first.name))
        until(lambda: link._sides[1].ended)
        other.read(1, *whole(mine, second), FAR)
        mine.on_thread(lambda: None)
        assert len(_dispatcher(mine)._by_secret) == 1
        assert _dispatcher(mine)._kept


@pytest.mark.parametrize("fault", [_raise, _defect], ids=["error", "defect"])
def test_a_session_whose_end_fails_leaves_nothing(fault: Break) -> None:
    """Its process has ended: the descriptor of that is readable, and would be for ever."""
    with nodes(kinds=[PuttingTransport]) as (mine, theirs), _Sleeping() as process:
        pidfd = os.pidfd_open(process.pid)
        links = open_links([mine, theirs])
        peers = {0: Peer(0, mine.name), 1: Peer(1, theirs.name, pidfd=pidfd)}
        object.__setattr__(links[0]._group, "peers", peers)
        attach_links(links)
        links[0].read(1, *whole(mine, theirs, 64), FAR)
        mine.on_thread(partial(setattr, mine.transport.engine, "withdraw", fault))
        process.kill()
        until(lambda: links[0]._sides[1].ended)
        mine.on_thread(lambda: None)
        found = _dispatcher(mine)
        assert not found._by_secret
        assert not found._pidfds
        assert not found.loop._watched
        for link in links:
            link.close()
        os.close(pidfd)


class _Sleeping:
    def __enter__(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(["sleep", "1000"])
        return self._process

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def test_what_a_call_or_an_event_raises_does_not_end_the_thread() -> None:
    with nodes() as (mine, theirs), linked([mine, theirs]) as (link, _):
        _dispatcher(mine).loop.call(cast("Callable[[], None]", _defect))
        mine.on_thread(lambda: setattr(_dispatcher(mine), "tick", _defect))
        mine.on_thread(lambda: _dispatcher(mine).loop.expect_tick(0.0))
        link.read(1, *whole(mine, theirs), FAR)
        assert _dispatcher(mine).loop.ended is None


def test_a_tick_that_failed_is_followed_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "RETRY_SECONDS", 0.01)
    ticks: list[int] = []

    def fail() -> None:
        ticks.append(1)
        raise ValueError("a defect")

    with nodes(1) as (mine,):
        mine.on_thread(lambda: setattr(_dispatcher(mine), "tick", fail))
        mine.on_thread(lambda: _dispatcher(mine).loop.expect_tick(0.0))
        until(lambda: len(ticks) > 2)


def test_a_loss_that_is_told_late_ends_no_later_connection() -> None:
    with nodes() as (mine, theirs):
        (first, one), (second, two) = [_connected(mine, theirs) for _ in range(2)]
        links, connections = [one, two], [first, second]
        mine.transport.peer_lost(connections[0])
        until(lambda: links[0][0]._sides[1].ended)
        mine.on_thread(lambda: None)
        links[1][0].write(1, *whole(mine, theirs), FAR)
        mine.transport.peer_lost(connections[1])
        until(lambda: links[1][0]._sides[1].ended)
        for connection in connections:
            mine.transport.disconnect(connection)
        for link in (*links[0], *links[1]):
            link.close()


def _connected(mine: Node, theirs: Node) -> tuple[Peer, list[MessagingLink]]:
    peer = Peer(1, theirs.name)
    peer = replace(peer, connection=mine.transport.connect(peer))
    links = open_links([mine, theirs])
    links[0]._group = replace(links[0]._group, peers={0: Peer(0, mine.name), 1: peer})
    attach_links(links)
    links[0].read(1, *whole(mine, theirs, 64), FAR)
    return peer, links


def test_a_session_that_is_not_used_serves_the_next_connection() -> None:
    with nodes() as (mine, theirs):
        sessions: list[session.Session] = []
        for _ in range(3):
            peer, links = _connected(mine, theirs)
            sessions += _dispatcher(mine)._by_secret.values()
            for link in links:
                link.close()
            mine.transport.disconnect(peer)
        assert len(set(sessions)) == 1


def test_a_process_that_cannot_be_watched_leaves_no_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "no space for another descriptor")

    with nodes() as (mine, theirs), _Sleeping() as process:
        pidfd = os.pidfd_open(process.pid)
        links = open_links([mine, theirs])
        peers = {0: Peer(0, mine.name), 1: Peer(1, theirs.name, pidfd=pidfd)}
        object.__setattr__(links[0]._group, "peers", peers)
        monkeypatch.setattr(_dispatcher(mine).loop, "watch", refuse)
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(LinkError, match=r"cannot be watched.*no space"):
            links[0].attach(1, links[1].offer(0))
        assert not _dispatcher(mine)._by_secret
        until(lambda: len(os.listdir("/proc/self/fd")) <= before)
        for link in links:
            link.close()
        os.close(pidfd)


# -- sessions that are not used any more -------------------------------------------------------------


def _without_bye(message: bytearray) -> tuple[bytearray, ...]:
    return () if message[4] == Kind.BYE else (message,)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short times."""
    for module in (dispatcher, session):
        monkeypatch.setattr(module, "TICK_SECONDS", 0.02)
    monkeypatch.setattr(dispatcher, "UNUSED_SECONDS", 0.02)


def test_a_peer_that_never_says_bye_costs_two_sessions(quick: None) -> None:
    with nodes() as (mine, bad):
        bad.on_thread(lambda: setattr(bad.transport.engine.faults, "on_send", _without_bye))
        for _ in range(6):
            with linked([mine, bad]) as (link, _):
                link.read(1, *whole(mine, bad, 64), FAR)
            until(lambda: not _dispatcher(mine)._by_incarnation)
        left = mine.on_thread(lambda: len(_dispatcher(mine)._by_secret))
        assert left <= dispatcher.MAX_RETIRED
        until(lambda: len(mine.transport.engine.endpoints) <= dispatcher.MAX_RETIRED)


def test_a_session_that_is_not_used_ends_without_the_peer(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "RETIRED_SECONDS", 0.1)
    with nodes() as (mine, bad):
        bad.on_thread(lambda: setattr(bad.transport.engine.faults, "on_send", _without_bye))
        with linked([mine, bad]) as (link, _):
            link.read(1, *whole(mine, bad, 64), FAR)
        until(lambda: not _dispatcher(mine)._by_secret)
        until(lambda: not mine.transport.engine.endpoints)


def test_a_peer_that_dies_when_it_is_not_used_is_noticed(quick: None) -> None:
    """By `problem`, where the engine has nothing else."""
    with nodes() as (mine, bad):
        bad.on_thread(lambda: setattr(bad.transport.engine.faults, "on_send", _without_bye))
        with linked([mine, bad]) as (link, _):
            link.read(1, *whole(mine, bad, 64), FAR)
            endpoint = _dispatcher(mine)._of_side[link._sides[1]].endpoint
        until(lambda: not _dispatcher(mine)._by_incarnation)
        mine.on_thread(partial(setattr, endpoint, "problem", lambda: "it is gone"))
        until(lambda: not _dispatcher(mine)._by_secret)


# -- links that only one end has attached ------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1], ids=["who attached closes first", "the other"])
@pytest.mark.parametrize("soon", [False, True])
def test_a_link_that_one_end_attached_leaves_nothing(first: int, soon: bool) -> None:
    """Beside another one, whose session stays; ``soon``: the other end closes before it is greeted."""
    with nodes() as (mine, theirs), linked([mine, theirs]) as (link, _):
        link.read(1, *whole(mine, theirs, 64), FAR)
        for _ in range(5):
            links = open_links([mine, theirs])
            if soon:
                offer = links[1].offer(0)
                links[1].close()
                links[0].attach(1, offer)
            else:
                links[0].attach(1, links[1].offer(0))
                until(partial(_is_greeted, links[1]))
            links[first].close()
            links[1 - first].close()
        until(lambda: len(_dispatcher(mine)._sides) == len(_dispatcher(theirs)._sides) == 1)
        link.write(1, *whole(mine, theirs), FAR)


def test_a_link_that_both_ends_attached_is_closed_by_one_message(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also after an abort, which both ends have told each other before one of them closes."""
    with nodes() as (mine, theirs), linked([mine, theirs]) as (link, _):
        sent = [_closed_messages(node) for node in (mine, theirs)]
        links = open_links([mine, theirs])
        attach_links(links)
        links[0].read(1, *whole(mine, theirs, 64), FAR)
        links[0].abort(1)
        until(lambda: links[0]._sides[1] not in _dispatcher(mine)._of_side)
        for each in links:
            each.close()
        link.write(1, *whole(mine, theirs), FAR)
        for node in (mine, theirs):  # what was asked of it before it has done
            node.on_thread(lambda: None)
        assert [len(messages) for messages in sent] == [1, 1]
    assert "protocol" not in caplog.text


def _closed_messages(node: Node) -> list[bytearray]:
    """Those that the engine of this node sends from now on."""
    found: list[bytearray] = []

    def note(message: bytearray) -> tuple[bytearray]:
        if message[4] == Kind.CLOSED:
            found.append(message)
        return (message,)

    node.on_thread(lambda: setattr(node.transport.engine.faults, "on_send", note))
    return found


def _is_greeted(link: MessagingLink) -> bool:
    return link._sides[0].peer_attached


def _silent(message: bytearray) -> tuple[bytearray, ...]:
    return () if message[4] == Kind.CLOSED else (message,)


def test_sides_that_a_peer_never_closes_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their ranges are dropped at once; a write in flight is not forgotten."""
    monkeypatch.setattr(dispatcher, "MAX_REMOVED", 5)
    with nodes() as (mine, bad), linked([mine, bad]) as (link, _):
        link.read(1, *whole(mine, bad, 64), FAR)
        bad.on_thread(lambda: setattr(bad.transport.engine.faults, "on_send", _silent))
        held = open_links([mine, bad])
        attach_links(held)
        held[0].read(1, *whole(mine, bad, 64), FAR)
        with stuck(bad):
            error = late_write(held[0], mine, bad, 64)
            held[0].close()
            for _ in range(20):
                links = open_links([mine, bad])
                links[0].attach(1, links[1].offer(0))
                links[0].close()
            kept = mine.on_thread(lambda: list(_dispatcher(mine)._sides.values()))
            assert len(kept) <= 1 + dispatcher.MAX_REMOVED
            assert held[0]._sides[1] in kept
            assert all(not side.offer.ranges for side in kept if side.removed and side.offer)
            flight = error.in_flight
            assert flight is not None
            assert not flight.settled()
        until(flight.settled)
        held[1].close()


# -- offers ----------------------------------------------------------------------------------------


def test_descriptors_of_an_offer_are_closed_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, also where one is bad; what hangs there keeps nobody."""
    with nodes() as (mine, theirs):
        links = open_links([mine, theirs])
        offer = links[1].offer(0)
        pipe = os.pipe()
        with pytest.raises(LinkError, match="3 descriptors, expected none"):
            links[0].attach(1, Offer(offer.data, [pipe[0], 1 << 20, pipe[1]]))
        until(lambda: not any(map(is_open, pipe)))
        links[0].attach(1, offer)
        for link in links:
            link.close()


def test_a_lost_peer_is_told_if_its_process_lives() -> None:
    with nodes() as (mine, theirs), _Sleeping() as process:
        pidfd = os.pidfd_open(process.pid)
        links = open_links([mine, theirs])
        peers = {0: Peer(0, mine.name), 1: Peer(1, theirs.name, pidfd=pidfd)}
        object.__setattr__(links[0]._group, "peers", peers)
        attach_links(links)
        mine.transport.peer_lost(peers[1])
        until(lambda: links[1]._sides[0].ended)
        with pytest.raises(PeerLost):
            links[0].read(1, *whole(mine, theirs), FAR)
        for link in links:
            link.close()
        os.close(pidfd)

"""Connections that are cut while a write is in flight: the other end hears of the end all the same."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial

import pytest

from datadist.messaging import EngineError, dispatcher, farewells
from datadist.messaging.dispatcher import Dispatcher
from datadist.messaging.ending import End
from datadist.messaging.farewells import Farewells
from datadist.messaging.link import MessagingLink
from datadist.messaging.wire import Kind, pack
from datadist.transport import TransferTimeout
from tests.messaging_links import (
    FAR,
    Node,
    RawPeer,
    attach_links,
    late_write,
    linked,
    nodes,
    offer_of,
    open_links,
    until,
    whole,
)
from tests.pair_engine import PairEndpoint

SIZE = 100_000


def _dispatcher(node: Node) -> Dispatcher:
    return node.transport._dispatcher


def _cut(node: Node) -> None:
    """The connections that this node has made."""

    def cut() -> None:
        for endpoint in list(node.transport.engine.endpoints.values()):
            with suppress(OSError):
                endpoint.sock.shutdown(socket.SHUT_RDWR)

    node.on_thread(cut)


def _drop(node: Node, *kinds: Kind) -> None:
    """Messages of these kinds do not arrive."""
    faults = node.transport.engine.faults
    node.on_thread(lambda: setattr(faults, "on_send", lambda m: () if m[4] in kinds else (m,)))


def _settled(error: BaseException) -> bool:
    flight = getattr(error, "in_flight", None)
    return flight is None or flight.settled()


def _is_empty(node: Node) -> bool:
    found = _dispatcher(node)
    return not found._sides and not node.on_thread(lambda: found._farewells.waiting)


@contextmanager
def _in_flight() -> Iterator[tuple[Node, Node, list[MessagingLink], TransferTimeout]]:
    """A write whose answer was lost; the links are closed by the test, or here."""
    with nodes() as (mine, owner):
        links = open_links([mine, owner])
        attach_links(links)
        links[0].read(1, *whole(mine, owner, 64), FAR)
        _drop(owner, Kind.DONE)
        error = late_write(links[0], mine, owner, SIZE)
        assert not _settled(error)
        _drop(owner)
        yield mine, owner, links, error
        for link in links:
            link.close()
        for node in (mine, owner):
            until(partial(_is_empty, node))


@pytest.mark.parametrize("who", ["both", "asker", "owner"])
def test_a_write_settles_although_the_connections_were_cut(who: str) -> None:
    with _in_flight() as (mine, owner, _, error):
        if who in ("both", "asker"):
            _cut(mine)
        if who in ("both", "owner"):
            _cut(owner)
        until(lambda: _settled(error))


@pytest.mark.parametrize("closes", ["both", "owner"])
def test_a_write_settles_although_the_answer_to_the_end_of_a_link_was_cut_off(closes: str) -> None:
    """The owner has closed its side, said so, and forgotten it, before the connection is lost."""
    with _in_flight() as (_, owner, links, error):
        _drop(owner, Kind.CLOSED)
        links[1].close()
        if closes == "both":
            links[0].close()
            until(lambda: not _dispatcher(owner)._sides)
        owner.on_thread(lambda: None)
        _drop(owner)
        _cut(owner)
        until(lambda: _settled(error))


@pytest.mark.parametrize("how", ["cut", "never sent"])
def test_what_an_ended_session_could_not_send_is_sent_again(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "CLOSE_SECONDS", 0.1)
    with _in_flight() as (_, owner, _, error):
        hold = partial(setattr, owner.transport.engine.faults, "hold")
        owner.on_thread(lambda: hold(True))
        for each in list(_dispatcher(owner)._by_secret.values()):
            owner.on_thread(partial(each.end, "a test", End.TOLD))
        if how == "cut":
            _cut(owner)
        else:
            until(lambda: owner.on_thread(lambda: not _dispatcher(owner)._closing))
        owner.on_thread(lambda: hold(False))
        until(lambda: _settled(error))


@pytest.mark.parametrize("fault", [EngineError("no route"), ValueError("a defect")])
def test_it_is_tried_again_while_the_peer_cannot_be_reached(
    fault: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(farewells, "TRY_SECONDS", 0.02)
    with _in_flight() as (mine, owner, _, error):
        engine, calls = owner.transport.engine, []
        connect = engine.connect

        def unreachable(address: bytes) -> PairEndpoint:
            calls.append(address)
            if len(calls) < farewells.TRIES:
                raise fault
            return connect(address)

        owner.on_thread(lambda: setattr(engine, "connect", unreachable))
        _cut(mine)
        _cut(owner)
        until(lambda: _settled(error))
        owner.on_thread(lambda: setattr(engine, "connect", connect))


def test_a_peer_that_is_not_reached_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(farewells, "TRY_SECONDS", 0.01)
    with _in_flight() as (mine, owner, _, error), nodes(1) as (third,):
        calls: list[bytes] = []

        def unreachable(address: bytes) -> PairEndpoint:
            calls.append(address)
            raise EngineError("no route")

        connect = owner.transport.engine.connect
        owner.on_thread(lambda: setattr(owner.transport.engine, "connect", unreachable))
        _cut(owner)
        until(lambda: len(calls) == farewells.TRIES)
        until(lambda: not owner.on_thread(lambda: _dispatcher(owner)._farewells.waiting))
        owner.on_thread(lambda: setattr(owner.transport.engine, "connect", connect))
        with linked([owner, third]) as (link, _):
            link.read(1, *whole(owner, third, 64), FAR)
        with linked([mine, owner]):
            until(lambda: _settled(error))


def test_a_peer_whose_session_was_cut_can_be_linked_again_at_once() -> None:
    with _in_flight() as (mine, owner, _, error):
        _cut(owner)
        for _ in range(3):
            with linked([mine, owner]) as (link, _):
                link.write(1, *whole(mine, owner, SIZE), FAR)
        until(lambda: _settled(error))


@pytest.mark.parametrize("late", [Kind.READ, Kind.HELLO, Kind.CLOSED])
def test_what_comes_late_of_a_session_that_was_cut_costs_no_other_link(late: Kind) -> None:
    """Messages of the old connection may be read after that of the new one."""
    raw = RawPeer()
    with nodes() as (mine, owner), linked([mine, owner]) as (link, owners):
        other = open_links([mine, owner])
        attach_links(other)
        other[0].read(1, *whole(mine, owner, 64), FAR)
        offer = offer_of(other[1], 0)
        closed = pack(Kind.CLOSED, offer.secret, farewells.SESSION_ENDED)
        raw.send(offer.address, closed, pack(late, offer.secret, body=b"x" * 16))
        until(lambda: other[1]._sides[0].ended)
        owner.on_thread(lambda: None)
        link.write(1, *whole(mine, owner, SIZE), FAR)
        owners.write(0, *whole(owner, mine, SIZE), FAR)
        for each in other:
            each.close()
    raw.close()


def test_a_session_that_ends_while_it_tells_of_others_leaves_no_endpoint() -> None:
    """What it has to tell itself goes along with them, over one endpoint."""
    with nodes(1) as (mine,):
        engine, added = mine.transport.engine, list[bytes]()

        def end(address: bytes, _: Mapping[bytes, bytes]) -> bool:
            if not added:
                added.append(address)
                found.add(address, {b"b" * 16: b"its session was cut"})
            return False

        def add() -> None:
            found.add(engine.address, {b"a" * 16: b"closed"})
            made.append(
                len(engine.endpoints)
            )  # before any of them has sent everything and is closed

        found, made = Farewells(engine, lambda _: None, end), list[int]()
        mine.on_thread(add)
        assert made == [1]
        mine.on_thread(found.close)
        assert not engine.endpoints

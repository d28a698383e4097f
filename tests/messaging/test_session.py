"""What peers and engines can do wrong; it costs the session with that peer, and nothing else."""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from datadist.messaging import Arrived
from datadist.messaging import session as sessions
from datadist.messaging.ending import End
from datadist.messaging.farewells import Farewells
from datadist.messaging.link import MessagingLink
from datadist.messaging.transfer import Transfer
from datadist.messaging.wire import Kind, Refusal, pack, pack_request
from datadist.transport import PeerLost, TransferError, TransferTimeout
from tests.messaging_links import (
    FAR,
    Calling,
    Node,
    RawPeer,
    linked,
    nodes,
    offer_of,
    open_links,
    until,
    whole,
)
from tests.pair_engine import Fault, PairTransport, PuttingTransport

REPLY = b"r" * 16


@pytest.fixture
def raw() -> Iterator[RawPeer]:
    """A peer without the base."""
    peer = RawPeer()
    yield peer
    peer.close()


def _faults(node: Node, **faults: object) -> None:
    for name, value in faults.items():
        node.on_thread(partial(setattr, node.transport.engine.faults, name, value))


def _busy(node: Node) -> bool:
    return any(each.busy for each in node.transport._dispatcher._by_secret.values())


def _request(kind: Kind, secret: bytes, node: Node, size: int = 8, count: int = 1) -> bytearray:
    addresses = array("q", [node.region.address] * count)
    room = size * count if kind is Kind.WRITE else 0
    return pack_request(
        kind, secret, 1, REPLY, 9.0, addresses, array("q", [size] * count), b"", room
    )


# -- messages ------------------------------------------------------------------------------------

Forged = Callable[[bytes, bytes, Node], list[bytes | bytearray]]
"""From the secret of the owner's side, that of its session, and the owner, to messages."""

ENDING: dict[str, Forged] = {
    "a huge count": lambda side, session, node: [
        pack(Kind.READ, side, 1, REPLY + b"\xff" * 8 + bytes(4))
    ],
    "a cut request": lambda side, session, node: [_request(Kind.READ, side, node)[:-1]],
    "more than a piece": lambda side, session, node: [_request(Kind.READ, side, node, 1 << 40)],
    "a sum that overflows": lambda side, session, node: [
        _request(Kind.READ, side, node, (1 << 63) - 1, 3)
    ],
    "a negative length": lambda side, session, node: [_request(Kind.READ, side, node, -8)],
    "data that is too short": lambda side, session, node: [
        _request(Kind.WRITE, side, node)[:-3]
    ],
    "a second hello": lambda side, session, node: [pack(Kind.HELLO, side, body=session)],
    "a request after the end": lambda side, session, node: [
        pack(Kind.CLOSED, side), _request(Kind.READ, side, node)
    ],
    "an answer to nothing": lambda side, session, node: [pack(Kind.DATA, session, 999, b"data")],
    "an answer of the past": lambda side, session, node: [pack(Kind.DONE, session, 0)],
    "a refusal of nothing": lambda side, session, node: [
        pack(Kind.REFUSED, session, 999, bytes([Refusal.OUTSIDE]))
    ],
    "a bye of nobody": lambda side, session, node: [pack(Kind.BYE, session, body=b"x" * 16)],
}  # fmt: skip

DROPPED: dict[str, Forged] = {
    "garbage": lambda side, session, node: [os.urandom(200)],
    "nothing": lambda side, session, node: [b""],
    "an unknown kind": lambda side, session, node: [
        pack(Kind.READ, side)[:4] + b"\x63" + bytes(27)
    ],
    "a wrong secret": lambda side, session, node: [_request(Kind.WRITE, b"w" * 16, node)],
    "an answer with a wrong secret": lambda side, session, node: [
        pack(Kind.DATA, b"w" * 16, 0, b"data")
    ],
}


def _send(raw: RawPeer, owner: Node, asker: Node, link: MessagingLink, forged: Forged) -> None:
    offer = offer_of(link, 0)
    session = next(iter(owner.transport._dispatcher._of_side.values()))
    raw.send(offer.address, *forged(offer.secret, session.secret, owner))


@pytest.mark.parametrize("what", ENDING)
def test_a_peer_that_breaks_the_protocol_loses_its_session_only(
    raw: RawPeer, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    with nodes(3) as (bad, owner, good):
        with linked([bad, owner]) as (link, owners), linked([good, owner]) as (other, _):
            link.read(1, *whole(bad, owner, 64), FAR)
            owner.fill(1)
            _send(raw, owner, bad, owners, ENDING[what])
            until(lambda: owners._sides[0].ended)
            with pytest.raises(TransferError) as caught:
                owners.read(0, *whole(owner, bad), FAR)
            assert "protocol" in str(caught.value) or "has ended its side" in str(caught.value)
            until(lambda: link._sides[1].ended)
            with pytest.raises(TransferError):
                link.read(1, *whole(bad, owner), FAR)
            assert set(bytes(owner.memory)) == {1}
            other.read(1, *whole(good, owner), FAR)
            assert good.memory == owner.memory
        with linked([bad, owner]) as (link, _):
            link.read(1, *whole(bad, owner), FAR)
    assert "was ended" in caplog.text


@pytest.mark.parametrize("what", DROPPED)
def test_messages_of_nobody_are_dropped(
    raw: RawPeer, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    with nodes() as (mine, owner), linked([mine, owner]) as (link, owners):
        link.read(1, *whole(mine, owner, 64), FAR)
        owner.fill(1)
        for _ in range(3):
            _send(raw, owner, mine, owners, DROPPED[what])
        until(lambda: "dropped a message" in caplog.text)
        link.read(1, *whole(mine, owner), FAR)
        assert set(bytes(owner.memory)) == {1}


def test_a_peer_may_say_twice_that_it_has_closed(
    raw: RawPeer, caplog: pytest.LogCaptureFixture
) -> None:
    """Once when it closes, and once when it is greeted after it has forgotten the link."""
    with nodes() as (mine, owner), linked([mine, owner]) as (link, owners):
        link.read(1, *whole(mine, owner, 64), FAR)
        (session,) = owner.transport._dispatcher._by_secret.values()
        offer = offer_of(owners, 0)
        raw.send(offer.address, *[pack(Kind.CLOSED, offer.secret)] * 2, b"the last one")
        until(lambda: "dropped a message" in caplog.text)
        assert owners._sides[0].ended
        assert session.ended is None


@pytest.mark.parametrize("message", [b"", b"garbage" * 9, b"ddm1\x63" + bytes(27)])
def test_garbage_of_a_peer_that_the_engine_knows_ends_its_session(message: bytes) -> None:
    with (
        nodes(3) as (bad, owner, good),
        linked([bad, owner]) as (_, owners),
        linked([good, owner]) as (other, _),
    ):
        other.read(1, *whole(good, owner), FAR)
        session = owner.transport._dispatcher._of_side[owners._sides[0]]
        arrived = Arrived(message, session.endpoint)
        owner.on_thread(lambda: owner.transport._dispatcher.event(arrived))
        assert "protocol" in str(owners._sides[0].ended)
        other.read(1, *whole(good, owner), FAR)


def test_requests_beyond_the_window_end_the_session(raw: RawPeer) -> None:
    with nodes() as (mine, owner), linked([mine, owner]) as (link, owners):
        link.read(1, *whole(mine, owner, 64), FAR)
        _faults(owner, never_complete=True)
        offer = offer_of(owners, 0)
        raw.send(offer.address, *[_request(Kind.READ, offer.secret, owner)] * 100)
        until(lambda: owners._sides[0].ended)
        assert "requests at a time" in str(owners._sides[0].ended)


# -- engines -------------------------------------------------------------------------------------


def _nth(number: int, fault: Fault) -> Fault:
    """A fault of one message, and no other."""
    count = iter(range(10**9))
    return lambda message: fault(message) if next(count) == number else (message,)


@pytest.mark.parametrize("at", ["asker", "owner"])
@pytest.mark.parametrize(
    "fault",
    [lambda m: (m, m), lambda m: (m[: len(m) // 2],), lambda m: (bytearray(os.urandom(len(m))),)],
    ids=["duplicate", "cut", "garbage"],
)  # fmt: skip
@pytest.mark.parametrize("kind", [PairTransport, PuttingTransport])
def test_damage_is_an_error_and_never_wrong_bytes(
    fault: Fault, at: str, kind: type[PairTransport]
) -> None:
    with nodes(kinds=[kind]) as (mine, owner):
        with linked([mine, owner]) as (link, _):
            mine.fill(1)
            owner.fill(2)
            link.read(1, *whole(mine, owner, 64), FAR)
            _faults(mine if at == "asker" else owner, on_send=_nth(3, fault))
            try:
                link.read(1, *whole(mine, owner), 1.0)
            except TransferError:
                assert set(bytes(mine.memory)) <= {1, 2}
            else:
                assert set(bytes(mine.memory)) == {2}
        _faults(mine, on_send=lambda m: (m,))
        _faults(owner, on_send=lambda m: (m,))


@pytest.mark.parametrize("at", ["asker", "owner"])
def test_lost_messages_cost_the_session_in_the_end(
    at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with nodes() as (mine, owner):
        with linked([mine, owner]) as (link, _):
            link.read(1, *whole(mine, owner, 64), FAR)
            _faults(mine if at == "asker" else owner, on_send=lambda m: ())
            with pytest.raises(TransferTimeout):
                link.read(1, *whole(mine, owner), 0.1)
            monkeypatch.setattr(sessions, "ANSWER_SECONDS", 0.1)
            with pytest.raises(PeerLost, match="did not answer"):
                link.read(1, *whole(mine, owner), FAR)
            _faults(mine, on_send=lambda m: (m,))
            _faults(owner, on_send=lambda m: (m,))
        monkeypatch.undo()
        with linked([mine, owner]) as (link, _):
            link.read(1, *whole(mine, owner), FAR)


def test_sends_that_never_complete_are_a_timeout() -> None:
    with nodes() as (mine, owner), linked([mine, owner]) as (link, _):
        link.read(1, *whole(mine, owner, 64), FAR)
        _faults(owner, never_complete=True)
        with pytest.raises(TransferTimeout):
            link.read(1, *whole(mine, owner), 0.3)


def test_an_error_of_a_send_loses_the_peer() -> None:
    def fail(message: bytearray) -> tuple[bytearray]:
        raise OSError("the cable is cut")

    with nodes() as (mine, owner), linked([mine, owner]) as (link, _):
        link.read(1, *whole(mine, owner, 64), FAR)
        _faults(mine, on_send=fail)
        with pytest.raises(PeerLost, match="the cable is cut"):
            link.read(1, *whole(mine, owner), FAR)


# -- sessions of which one end has broken ----------------------------------------------------------


def _broken(mine: Node, owner: Node, link: MessagingLink, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner's session ends, of which we hear nothing, and a read fills the window."""
    link.read(1, *whole(mine, owner, 64), FAR)
    monkeypatch.setattr(Farewells, "add", lambda *_: None)
    for each in list(owner.transport._dispatcher._by_secret.values()):
        owner.on_thread(partial(each.end, "a test", End.CUT))
    for seconds in (0.1, 1.0, 10.0):  # a slow machine may have asked for nothing yet
        with pytest.raises(TransferTimeout):
            link.read(1, *whole(mine, owner), seconds)
        if any(each._asked for each in mine.transport._dispatcher._by_secret.values()):
            return
    raise AssertionError("nothing was asked for")


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "open"])
@pytest.mark.parametrize("kind", [PairTransport, PuttingTransport])
def test_a_new_link_does_not_wait_for_answers_of_an_ended_session(
    first: int, closed: bool, kind: type[PairTransport], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever attaches first, and whether the earlier link is closed."""
    with nodes(kinds=[kind]) as (mine, owner), linked([mine, owner]) as before:
        _broken(mine, owner, before[0], monkeypatch)
        if closed:
            for link in before:
                link.close()
        links = open_links([mine, owner])
        for rank in (first, 1 - first):
            links[rank].attach(1 - rank, links[1 - rank].offer(rank))
        owner.fill(2)
        links[0].read(1, *whole(mine, owner), FAR)
        assert set(bytes(mine.memory)) == {2}
        with pytest.raises(TransferError, match="closed" if closed else "has begun another"):
            before[0].read(1, *whole(mine, owner), FAR)
        monkeypatch.setattr(sessions, "ANSWER_SECONDS", 0.0)
        mine.on_thread(mine.transport._dispatcher.tick)
        mine.on_thread(mine.transport._dispatcher.tick)
        links[0].write(1, *whole(mine, owner), FAR)
        for link in links:
            link.close()


def test_late_answers_of_an_ended_session_are_nothing(
    raw: RawPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with nodes() as (mine, owner), linked([mine, owner]) as before:
        _broken(mine, owner, before[0], monkeypatch)
        (session,) = mine.transport._dispatcher._by_secret.values()
        numbers = list(session._asked)
        with linked([mine, owner]) as (link, _):
            link.read(1, *whole(mine, owner), FAR)
            mine.fill(1)
            piece = mine.transport.engine.piece
            late = [pack(Kind.DATA, session.secret, n, room=piece) for n in numbers]
            raw.send(mine.transport.engine.address, *late)
            until(lambda: not session._dropped)
            assert set(bytes(mine.memory)) == {1}
            link.write(1, *whole(mine, owner), FAR)
            raw.send(mine.transport.engine.address, late[0])
            until(lambda: session.ended)
            assert "was not asked or was answered before" in str(session.ended)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("kind", [PairTransport, PuttingTransport])
def test_a_new_link_has_another_endpoint_than_one_that_the_peer_has_given_up(
    first: int, kind: type[PairTransport], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In some engines both endpoints are one connection: ours loses what is sent over it."""
    with nodes(kinds=[kind]) as (mine, owner), linked([mine, owner]) as before:
        _broken(mine, owner, before[0], monkeypatch)
        (session,) = mine.transport._dispatcher._by_secret.values()
        old = session.endpoint
        mine.on_thread(lambda: setattr(old, "send", lambda *_: None))
        links = open_links([mine, owner])
        for rank in (first, 1 - first):
            links[rank].attach(1 - rank, links[1 - rank].offer(rank))
        for rank, node, other in ((0, mine, owner), (1, owner, mine)):
            other.fill(2 + rank)
            links[rank].read(1 - rank, *whole(node, other), FAR)
            assert set(bytes(node.memory)) == {2 + rank}
            links[rank].write(1 - rank, *whole(node, other), FAR)
        assert old not in mine.transport.engine.endpoints.values()
        assert len(mine.transport._dispatcher._by_secret) == 1
        for link in links:
            link.close()
        until(lambda: not _busy(mine) and not _busy(owner))


# -- windows and turns -----------------------------------------------------------------------------


@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_a_peer_that_takes_nothing_fills_one_window(write: bool) -> None:
    with nodes(size=16 << 20) as (mine, owner), linked([mine, owner]) as (link, _):
        link.read(1, *whole(mine, owner, 64), FAR)
        slow = mine if write else owner
        _faults(slow, hold=True)
        move = link.write if write else link.read
        moves = [Calling(lambda: move(1, *whole(mine, owner), FAR)) for _ in range(4)]
        engine = slow.transport.engine
        until(lambda: _busy(slow))
        time.sleep(0.1)  # more would come now
        held = slow.on_thread(
            lambda: sum(len(v) for e in engine.endpoints.values() for v, _ in e.queue)
        )
        assert held <= engine.window * engine.max_message
        _faults(slow, hold=False)
        assert [each.result() for each in moves] == [None] * 4


@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_small_transfers_pass_large_ones(write: bool) -> None:
    """In turns: a small one waits for one piece of each of the others."""
    with nodes(size=16 << 20) as (mine, owner), linked([mine, owner]) as (link, _):
        link.read(1, *whole(mine, owner, 64), FAR)
        _faults(mine, hold=True)
        move = link.write if write else link.read
        large = [Calling(lambda: move(1, *whole(mine, owner), FAR)) for _ in range(2)]
        until(lambda: len(mine.transport.engine.faults.sent) > 2)
        small = Calling(lambda: link.read(1, *whole(mine, owner, 64), FAR))
        session = next(iter(mine.transport._dispatcher._by_secret.values()))
        until(lambda: len(session._queue) == 3)
        last, asked, ask = session._queue[-1], list[Transfer](), session._ask

        def noted(transfer: Transfer) -> None:
            asked.append(transfer)
            ask(transfer)

        mine.on_thread(partial(setattr, session, "_ask", noted))
        _faults(mine, hold=False)
        assert small.result() is None
        assert asked.index(last) <= 2
        assert [each.result() for each in large] == [None, None]


def test_many_transfers_of_one_pair_run_at_once() -> None:
    with nodes(size=1 << 20) as (mine, owner), linked([mine, owner]) as (link, owners):
        mine.fill(1)
        owner.fill(2)
        calls = [
            Calling(partial(link.read, 1, *whole(mine, owner, 1 + 40_000 * n), FAR))
            for n in range(16)
        ]
        back = [Calling(lambda: owners.read(0, *whole(owner, mine, 1), FAR)) for _ in range(8)]
        assert [each.result() for each in (*calls, *back)] == [None] * 24
        assert bytes(mine.memory[: 1 + 40_000 * 15]) in (
            b"\2" * (1 + 40_000 * 15), b"\1" + b"\2" * (40_000 * 15)
        )  # fmt: skip

"""Reads and writes over links of the base class; what ends them, and what they leave untouched."""

from __future__ import annotations

import time
from functools import partial

import pytest

from datadist.messaging.link import MessagingLink
from datadist.messaging.pieces import Spans
from datadist.messaging.session import Session
from datadist.messaging.side import Side
from datadist.messaging.wire import Request
from datadist.transport import (
    Access,
    AddressError,
    LinkError,
    Offer,
    PeerLost,
    TransferError,
    TransferTimeout,
    Unsupported,
)
from tests.messaging_links import (
    FAR,
    Calling,
    Node,
    Vectors,
    attach_links,
    columns,
    linked,
    nodes,
    open_links,
    until,
    whole,
)
from tests.pair_engine import PairTransport, PolledTransport, PuttingTransport


def _hold(node: Node, hold: bool = True) -> None:
    node.on_thread(lambda: setattr(node.transport.engine.faults, "hold", hold))


def _ended(link: MessagingLink) -> str | None:
    return link._sides[1].ended


def _write_until_it_fails(link: MessagingLink, vectors: Vectors) -> None:
    while True:
        link.write(1, *vectors, FAR)


def _sessions(node: Node) -> list[Session]:
    return list(node.transport._dispatcher._by_secret.values())


@pytest.mark.parametrize(
    "kinds",
    [(PuttingTransport,), (PuttingTransport, PairTransport), (PairTransport, PuttingTransport),
     (PolledTransport,)],
    ids=["putting", "putting and not", "not and putting", "polled"],
)  # fmt: skip
def test_engines_of_all_kinds_move_both_ways(kinds: tuple[type[PairTransport], ...]) -> None:
    with nodes(kinds=kinds) as (mine, theirs), linked([mine, theirs]) as (link, _):
        mine.fill(1)
        theirs.fill(2)
        link.read(1, *whole(mine, theirs), FAR)
        assert mine.memory == theirs.memory
        mine.fill(3)
        link.write(1, *whole(mine, theirs), FAR)
        assert mine.memory == theirs.memory


def test_a_transfer_waits_until_the_peer_has_attached() -> None:
    with nodes() as (mine, theirs):
        ours, others = open_links([mine, theirs])
        ours.attach(1, others.offer(0))
        reading = Calling(lambda: ours.read(1, *whole(mine, theirs), FAR))
        until(lambda: any(session.busy for session in _sessions(mine)))
        assert not reading.ended
        others.attach(0, ours.offer(1))
        assert reading.result() is None
        for link in (ours, others):
            link.close()


@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_a_transfer_that_timed_out_touches_nothing_later(write: bool) -> None:
    with nodes() as (mine, theirs), linked([mine, theirs]) as (link, _):
        mine.fill(1)
        theirs.fill(2)
        link.read(1, *whole(mine, theirs, 1), FAR)
        _hold(theirs)
        move = link.write if write else link.read
        with pytest.raises(TransferTimeout) as caught:
            move(1, *whole(mine, theirs), 0.2)
        assert caught.value.link_usable
        mine.fill(7)
        _hold(theirs, False)
        if write:
            link.write(1, *whole(mine, theirs), FAR)
            assert theirs.memory == mine.memory
        else:
            until(lambda: not any(session.busy for session in _sessions(mine)))
            assert set(bytes(mine.memory)) == {7}
            link.read(1, *whole(mine, theirs), FAR)
            assert mine.memory == theirs.memory


def test_a_later_write_is_not_replaced_by_one_that_timed_out() -> None:
    with nodes() as (mine, theirs), linked([mine, theirs]) as (link, _):
        link.read(1, *whole(mine, theirs, 1), FAR)
        _hold(mine)
        mine.fill(1)
        with pytest.raises(TransferTimeout):
            link.write(1, *whole(mine, theirs), 0.2)
        mine.fill(2)
        writing = Calling(lambda: link.write(1, *whole(mine, theirs), FAR))
        until(lambda: any(session._queue for session in _sessions(mine)))
        _hold(mine, False)
        assert writing.result() is None
        assert set(bytes(theirs.memory)) == {2}


@pytest.mark.parametrize("side", ["asker", "owner"])
@pytest.mark.parametrize("how", ["abort", "close"])
def test_what_waits_ends_with_the_link(side: str, how: str) -> None:
    with nodes() as (mine, theirs), linked([mine, theirs]) as links:
        links[0].read(1, *whole(mine, theirs, 1), FAR)
        _hold(theirs)
        reading = Calling(lambda: links[0].read(1, *whole(mine, theirs), FAR))
        until(lambda: _sessions(theirs)[0].unsent)
        ending = links[0 if side == "asker" else 1]
        if how == "close":
            ending.close()
        else:
            ending.abort(1 if side == "asker" else 0)
        if side == "owner":
            _hold(theirs, False)
        error = reading.result()
        assert isinstance(error, TransferError)
        assert not error.link_usable
        _hold(theirs, False)


def test_nothing_lands_after_the_owner_has_closed() -> None:
    with nodes() as (mine, theirs), linked([mine, theirs]) as (link, owners):
        mine.fill(1)
        theirs.fill(2)
        writing = Calling(lambda: _write_until_it_fails(link, whole(mine, theirs)))
        until(lambda: theirs.memory[0] == 1)
        assert owners.close() == frozenset()
        theirs.fill(5)
        assert isinstance(writing.result(), TransferError)
        until(lambda: not any(session.busy for session in _sessions(mine)))
        assert set(bytes(theirs.memory)) == {5}


def test_a_side_that_ended_between_check_and_copy_copies_nothing() -> None:
    with nodes(size=64) as (owner, _):
        owner.fill(1)
        side = Side(
            0, Spans([(owner.region.address, owner.region.address + 64)]), Access.READ_WRITE
        )
        request = Request(b"", 0, [owner.region.address], [64], b"", 0, 64)
        assert side.refusal(True, request) is None
        side.end("closed")
        assert not side.copy_in(request, bytearray(64))
        assert set(bytes(owner.memory)) == {1}
        into = bytearray(64)
        assert not side.copy_out(request, into, 0)
        assert into == bytearray(64)


def test_bytes_outside_are_refused_before_anything_moves() -> None:
    with nodes() as (mine, theirs), linked([mine, theirs]) as (link, _):
        mine.fill(1)
        theirs.fill(2)
        here, there, end = mine.region.address, theirs.region.address, theirs.region.size
        bad = [(there - 1, 2), (there + end - 1, 2), (there + end, 1), (1 << 62, 8), (-8, 8),
               ((1 << 63) - 1, 1), (there, (1 << 63) - 1)]  # fmt: skip
        for address, size in bad:
            for move in (link.read, link.write):
                with pytest.raises(AddressError, match=f"{size} bytes at"):
                    move(1, *columns((here, there, 64), (here, address, size)), FAR)
        assert set(bytes(mine.memory)) == {1}
        assert set(bytes(theirs.memory)) == {2}


def test_who_was_granted_reading_cannot_write() -> None:
    with nodes() as (mine, theirs), linked([mine, theirs], Access.READ) as (link, _):
        theirs.fill(2)
        with pytest.raises(Unsupported):
            link.write(1, *whole(mine, theirs), FAR)
        assert set(bytes(theirs.memory)) == {2}


def test_an_owner_that_is_gone_is_lost_for_all_links() -> None:
    with nodes() as (mine, theirs):
        links = [open_links([mine, theirs]) for _ in range(3)]
        for pair in links:
            attach_links(pair)
            pair[0].read(1, *whole(mine, theirs, 64), FAR)
        _hold(theirs)  # its thread is still there and says nothing
        theirs.transport.engine.close()
        for ours, _ in links:
            with pytest.raises(PeerLost) as caught:
                ours.read(1, *whole(mine, theirs), FAR)
            assert caught.value.rank == 1
        for pair in links:
            for link in pair:
                link.close()


def test_a_lost_peer_that_core_names_ends_transfers() -> None:
    with nodes() as (mine, theirs), linked([mine, theirs]) as (link, _):
        link.read(1, *whole(mine, theirs, 1), FAR)
        _hold(theirs)
        reading = Calling(lambda: link.read(1, *whole(mine, theirs), FAR))
        until(lambda: _sessions(theirs)[0].unsent)
        mine.transport.peer_lost(link._group.peers[1])
        assert isinstance(reading.result(), PeerLost)
        _hold(theirs, False)


def test_links_can_be_made_again_after_the_session_has_ended() -> None:
    with nodes() as (mine, theirs):
        for _ in range(3):
            with linked([mine, theirs]) as (link, _):
                link.read(1, *whole(mine, theirs), FAR)
                mine.transport.peer_lost(link._group.peers[1])
                until(partial(_ended, link))
                with pytest.raises(PeerLost):
                    link.read(1, *whole(mine, theirs), FAR)


@pytest.mark.parametrize("data", [b"", b"no offer", b"datadist messaging offer 1\n" + bytes(90)])
def test_offers_that_are_none_are_refused(data: bytes) -> None:
    with nodes() as (mine, theirs):
        links = open_links([mine, theirs])
        with pytest.raises(LinkError, match="rank 1 is of no use"):
            links[0].attach(1, Offer(data))
        for link in links:
            link.close()


def test_a_peer_that_cannot_be_connected_is_a_link_error() -> None:
    with nodes() as (mine, theirs):
        links = open_links([mine, theirs])
        offer = links[1].offer(0)
        theirs.transport.close()
        with pytest.raises(LinkError, match="rank 1 cannot be reached"):
            links[0].attach(1, offer)
        links[0].close()


def test_a_closed_link_refuses_everything() -> None:
    with nodes() as (mine, theirs):
        ours, others = open_links([mine, theirs])
        ours.close()
        with pytest.raises(LinkError, match="closed"):
            ours.attach(1, others.offer(0))
        with pytest.raises(TransferError, match="closed"):
            ours.read(1, *whole(mine, theirs), FAR)
        others.close()


def test_a_stopped_engine_ends_everything(caplog: pytest.LogCaptureFixture) -> None:
    def defect() -> None:
        raise ValueError("a defect")

    with nodes() as (mine, theirs), linked([mine, theirs]) as (link, _):
        link.read(1, *whole(mine, theirs, 64), FAR)
        _hold(theirs)
        reading = Calling(lambda: link.read(1, *whole(mine, theirs), FAR))
        until(lambda: _sessions(theirs)[0].unsent)
        mine.transport.engine.poll = defect  # type: ignore[method-assign, assignment]
        mine.transport._dispatcher.loop.call(lambda: None)
        assert isinstance(reading.result(), TransferError)
        with pytest.raises(TransferError, match="a defect"):
            link.read(1, *whole(mine, theirs), FAR)
        with pytest.raises(LinkError, match="a defect"):
            open_links([mine, theirs])
        assert "please report it" in caplog.text
        _hold(theirs, False)


def test_a_deadline_that_has_passed_ends_at_once() -> None:
    with nodes() as (mine, theirs), linked([mine, theirs]) as (link, _):
        begin = time.monotonic()
        for _ in range(20):
            try:
                link.read(1, *whole(mine, theirs), 0.0)
            except TransferTimeout:
                continue
        assert time.monotonic() - begin < FAR
        link.read(1, *whole(mine, theirs), FAR)
        assert mine.memory == theirs.memory

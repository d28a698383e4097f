"""What goes on of a transfer whose call has ended: `in_flight`, and when that settles."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

from datadist.messaging import dispatcher, session, side, transfer
from datadist.messaging import link as link_module
from datadist.messaging.ending import End
from datadist.messaging.link import MessagingLink
from datadist.messaging.pieces import gather, scatter
from datadist.messaging.wire import Kind
from datadist.transport import (
    Access,
    Peer,
    PeerLost,
    TransferError,
    TransferTimeout,
)
from tests import interrupts
from tests.messaging_links import (
    FAR,
    Calling,
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

SIZE = 100_000


def _settled(error: BaseException | None) -> bool:
    flight = getattr(error, "in_flight", None)
    return flight is None or flight.settled()


@contextmanager
def _pair(size: int = 4 << 20) -> Iterator[tuple[Node, Node, MessagingLink, MessagingLink]]:
    with nodes(size=size) as (mine, theirs), linked([mine, theirs]) as (link, owners):
        link.read(1, *whole(mine, theirs, 64), FAR)
        mine.fill(1)
        theirs.fill(2)
        yield mine, theirs, link, owners


# -- writes that the owner has not taken -------------------------------------------------------------


def test_a_write_that_timed_out_is_in_flight_until_the_owner_has_answered() -> None:
    with _pair() as (mine, theirs, link, _):
        with stuck(theirs):
            error = late_write(link, mine, theirs, SIZE)
            assert not _settled(error)
            link.abort(1)
            time.sleep(0.05)
            assert not _settled(error), "to abort it here tells nothing of the owner"
        until(lambda: _settled(error))
        theirs.fill(9)
        time.sleep(0.1)
        assert set(bytes(theirs.memory)) == {9}


def test_a_write_of_which_nothing_was_sent_is_over() -> None:
    with nodes() as (mine, theirs):
        link, owners = open_links([mine, theirs])
        link.attach(1, owners.offer(0))  # the owner has not attached: nothing is asked yet
        with pytest.raises(TransferTimeout) as caught:
            link.write(1, *whole(mine, theirs, SIZE), 0.1)
        assert caught.value.in_flight is None
        owners.attach(0, link.offer(1))
        link.write(1, *whole(mine, theirs), FAR)
        link.close()
        owners.close()


@pytest.mark.parametrize("how", ["abort", "close"])
def test_a_write_that_its_link_ended_is_in_flight_as_well(how: str) -> None:
    with _pair() as (mine, theirs, link, _):
        with stuck(theirs):
            writing = Calling(lambda: link.write(1, *whole(mine, theirs, SIZE), FAR))
            until(lambda: mine.on_thread(lambda: any(s._asked for s in _sessions(mine))))
            link.abort(1) if how == "abort" else link.close()
            error = writing.result()
            assert isinstance(error, TransferError)
            assert not _settled(error)
        until(lambda: _settled(error))


def _sessions(node: Node) -> list[session.Session]:
    return list(node.transport._dispatcher._by_secret.values())


def _no_answer(mine: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "ANSWER_SECONDS", 0.0)


def _violation(mine: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in _sessions(mine):
        mine.on_thread(partial(mine.transport._dispatcher._violated, each, "a test"))


def _cut(mine: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in _sessions(mine):
        mine.on_thread(partial(each.end, "a cut cable", End.CUT))


def _relink(mine: Node, theirs: Node, owners: MessagingLink) -> None:
    for each in _sessions(theirs):
        theirs.on_thread(partial(each.end, "a cut cable", End.CUT))
    with linked([mine, theirs]) as (again, _):
        again.read(1, *whole(mine, theirs, 64), FAR)


def _close(mine: Node, theirs: Node, owners: MessagingLink) -> None:
    owners.close()


def _wait(mine: Node, theirs: Node, owners: MessagingLink) -> None:
    """It has heard of the end."""


@pytest.mark.parametrize(
    ("end", "confirm"),
    [(_no_answer, _wait), (_violation, _wait), (_cut, _close), (_cut, _relink)],
)
def test_the_end_of_the_session_settles_no_write(
    end: Callable[[Node, pytest.MonkeyPatch], None],
    confirm: Callable[[Node, Node, MessagingLink], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The owner confirms: it hears of the end, closes its side, or greets us by another session."""
    with _pair() as (mine, theirs, link, owners):
        with stuck(theirs):
            error = late_write(link, mine, theirs, SIZE)
            end(mine, monkeypatch)
            until(lambda: not _sessions(mine))
            time.sleep(0.05)
            assert not _settled(error)
        confirm(mine, theirs, owners)
        until(lambda: _settled(error))
        theirs.fill(9)
        time.sleep(0.05)
        assert set(bytes(theirs.memory)) == {9}
        until(lambda: len(mine.transport.engine.endpoints) == len(_sessions(mine)))
        until(lambda: not mine.transport._dispatcher._unconfirmed._sides)


def test_a_write_settles_when_the_owner_is_gone() -> None:
    """Its process, although the session has ended before; the descriptor of it is given back."""
    with nodes() as (mine, theirs), ExitStack() as stack:
        process = subprocess.Popen(["sleep", "1000"])
        stack.callback(process.wait)
        stack.callback(process.kill)
        pidfd = os.pidfd_open(process.pid)
        stack.callback(os.close, pidfd)
        peers = {0: Peer(0, mine.name), 1: Peer(1, theirs.name, pidfd=pidfd)}
        links = open_links([mine, theirs])
        links[0]._group = replace(links[0]._group, peers=peers)
        attach_links(links)
        for rank, node, other in ((0, mine, theirs), (1, theirs, mine)):  # all connections are made
            links[rank].read(1 - rank, *whole(node, other, 64), FAR)
        descriptors = len(os.listdir("/proc/self/fd"))
        with stuck(theirs):
            error = late_write(links[0], mine, theirs, SIZE)
            mine.transport.peer_lost(peers[1])
            until(lambda: links[0]._sides[1].ended)
            mine.on_thread(lambda: None)
            assert not _settled(error), "core has lost it, but its process lives"
            process.kill()
            until(lambda: _settled(error))
        until(lambda: len(os.listdir("/proc/self/fd")) < descriptors)
        for link in links:
            link.close()


def test_force_settles_what_the_owner_confirms_and_nothing_else() -> None:
    with _pair() as (mine, theirs, link, _):
        theirs.on_thread(lambda: setattr(theirs.transport.engine.faults, "on_send", _without_done))
        error = late_write(link, mine, theirs, SIZE)
        assert not _settled(error)
        link.force(1)
        assert _settled(error)
        with pytest.raises(TransferError):
            link.write(1, *whole(mine, theirs, SIZE), FAR)
    with _pair() as (mine, theirs, link, _):
        with stuck(theirs):
            error = late_write(link, mine, theirs, SIZE)
            with pytest.raises(TransferError, match="rank 1 has not confirmed"):
                link.force(1)
            assert not _settled(error)
            with pytest.raises(TransferError, match="the link was aborted"):
                link.write(1, *whole(mine, theirs, SIZE), FAR)
        until(lambda: _settled(error))


def test_forcing_waits_once_for_all_ranks_that_were_aborted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [time.monotonic()]
    with nodes(4) as members, linked(members) as links, ExitStack() as stopped:
        mine, *owners = members
        for rank, owner in enumerate(owners, 1):
            links[0].read(rank, *whole(mine, owner, 64), FAR)
            stopped.enter_context(stuck(owner))
            late_write(links[0], mine, owner, SIZE, rank)
        clock = SimpleNamespace(
            monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds)
        )
        for module in (link_module, side):
            monkeypatch.setattr(module, "time", clock)
        begin = now[0]
        for rank in (1, 2, 3):
            links[0].abort(rank)
        for rank in (1, 2, 3):
            with pytest.raises(TransferError, match="has not confirmed"):
                links[0].force(rank)
        assert now[0] - begin < 2 * link_module.FORCE_SECONDS
        monkeypatch.undo()


def _without_done(message: bytearray) -> tuple[bytearray, ...]:
    return () if message[4] == Kind.DONE else (message,)


def test_ended_transfers_leave_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(dispatcher, "TICK_SECONDS", 0.05)
    with _pair() as (mine, theirs, link, _), stuck(theirs):
        for _ in range(20):
            with pytest.raises(TransferTimeout):
                link.read(1, *whole(mine, theirs, SIZE), 0.01)
        until(lambda: not any(each._queue for each in _sessions(mine)))


# -- signal handlers -------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_nothing_lands_unannounced_after_an_exception_of_a_handler(write: bool) -> None:
    with _pair(4096) as (mine, theirs, link, _):
        target, vectors = theirs if write else mine, whole(mine, theirs)
        move = partial(link.write if write else link.read, 1, *vectors, 0.005)
        moment, where = 1, "some"
        while where:
            mine.fill(1)
            theirs.fill(2)
            with stuck(theirs):
                where, error = _raise_at(moment, move)
                in_flight = not _settled(error)
                if not in_flight:
                    target.fill(3)
            until(lambda: not any(each._asked for each in _sessions(mine)))
            mine.on_thread(lambda: None)
            if in_flight:
                until(partial(_settled, error))
                target.fill(3)
            assert set(bytes(target.memory)) == {3}, where
            assert not link._sides[1]._transfers, where
            moment += 1


@pytest.mark.parametrize("times", [3, 20])
def test_handlers_that_raise_again_and_again_hide_nothing(
    times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time while the caller leaves: the error with which it does so at last tells of the write."""
    left: list[BaseException] = []
    leave = transfer.Transfer.leave

    def interrupted(self: transfer.Transfer, error: BaseException) -> None:
        if len(left) < times:
            left.append(error)
            raise interrupts.Interrupt
        leave(self, error)

    monkeypatch.setattr(transfer.Transfer, "leave", interrupted)
    with _pair() as (mine, theirs, link, _):
        with stuck(theirs):
            with pytest.raises(interrupts.Interrupt) as caught:
                link.write(1, *whole(mine, theirs, SIZE), 2.0)
            assert not _settled(caught.value)
            assert not link._sides[1]._transfers
        until(lambda: _settled(caught.value))


def _raise_at(moment: int, call: Callable[[], object]) -> tuple[str, BaseException | None]:
    try:
        return interrupts._raised_at(moment, call, interrupts.Interrupt)
    except TransferTimeout as error:
        return "", error


def _has_no_sides(node: Node) -> bool:
    return not node.transport._dispatcher._sides


def test_an_interrupted_close_can_be_repeated() -> None:
    with nodes() as members:
        moment, where = 1, "some"
        while where:
            links = open_links(members)
            attach_links(links)
            where, _ = interrupts._raised_at(moment, links[0].close, interrupts.Interrupt)
            for link in links:
                link.close()
            for node in members:
                until(partial(_has_no_sides, node))
                assert not node.on_thread(node.transport._dispatcher._holds.total)
            moment += 1


# -- pages that do not come ------------------------------------------------------------------------


class _Page:
    """A copy that waits, as for a page of memory."""

    def __init__(self, copy: Callable[..., None]) -> None:
        self._copy = copy
        self.reached, self.comes = threading.Event(), threading.Event()

    def __call__(self, *args: object) -> None:
        self.reached.set()
        assert self.comes.wait(FAR)
        self._copy(*args)


@contextmanager
def _missing_page(
    monkeypatch: pytest.MonkeyPatch, module: object, copy: Callable[..., None]
) -> Iterator[_Page]:
    page = _Page(copy)
    with monkeypatch.context() as patch:
        patch.setattr(module, copy.__name__, page)
        try:
            yield page
        finally:
            page.comes.set()


def test_a_local_page_that_does_not_come_is_a_timeout_in_flight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with _pair() as (mine, theirs, link, _), _missing_page(monkeypatch, transfer, scatter) as page:
        reading = Calling(lambda: link.read(1, *whole(mine, theirs, SIZE), 2.0))
        assert page.reached.wait(FAR)
        error = reading.result()
        assert isinstance(error, TransferTimeout)
        assert not _settled(error)
        with pytest.raises(TransferError, match="a page of our memory does not come"):
            link.force(1)
        page.comes.set()
        until(lambda: _settled(error))


@pytest.mark.parametrize("how", ["abort", "close"])
def test_a_page_that_does_not_come_keeps_nobody(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with _pair() as (mine, theirs, link, owners), _missing_page(monkeypatch, side, scatter) as page:
        writing = Calling(lambda: link.write(1, *whole(mine, theirs, SIZE), FAR))
        assert page.reached.wait(FAR)
        ending = Calling(lambda: owners.abort(0))
        assert ending.result() is None
        if how == "close":
            named: list[frozenset[int]] = []
            ending = Calling(lambda: named.append(owners.close()))
            assert ending.result() is None
            assert named == [frozenset({0})], "its bytes are being copied"
        link.abort(1)
        error = writing.result()
        assert not _settled(error)
        page.comes.set()
        until(lambda: _settled(error))


def test_who_was_granted_reading_is_never_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        nodes() as (mine, theirs),
        linked([mine, theirs], Access.READ) as (link, owners),
        _missing_page(monkeypatch, side, gather) as page,
    ):
        reading = Calling(lambda: link.read(1, *whole(mine, theirs, SIZE), FAR))
        assert page.reached.wait(FAR)
        assert owners.close() == frozenset()
        page.comes.set()
        assert isinstance(reading.result(), TransferError)


def test_an_abort_of_the_owner_is_effective_at_once() -> None:
    """Also for a write that has arrived, and waits for the thread of the engine."""
    with _pair() as (mine, theirs, link, owners):
        with stuck(theirs):
            writing = Calling(lambda: link.write(1, *whole(mine, theirs, SIZE), FAR))
            until(lambda: mine.on_thread(lambda: not any(s.unsent for s in _sessions(mine))))
            until(lambda: any(s._asked for s in _sessions(mine)))
            owners.abort(0)
            theirs.fill(9)
        error = writing.result()
        assert isinstance(error, TransferError)
        until(lambda: _settled(error))
        assert set(bytes(theirs.memory)) == {9}


def test_peers_that_are_lost_leave_no_write_in_flight() -> None:
    with _pair() as (mine, theirs, link, _), stuck(theirs):
        writing = Calling(lambda: link.write(1, *whole(mine, theirs, SIZE), FAR))
        until(lambda: any(s._asked for s in _sessions(mine)))
        mine.transport.peer_lost(link._group.peers[1])
        error = writing.result()
        assert isinstance(error, PeerLost)
        with contextlib.suppress(AttributeError):
            assert error.in_flight is None

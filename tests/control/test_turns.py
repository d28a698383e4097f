"""Each session has a bounded share of the control thread, and one that talks without pause no more."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datadist.control import session as sessions
from datadist.control import turns
from datadist.control.messages import HEADER, Idle, Message, Sync, encode
from datadist.control.reactor import Reactor
from datadist.control.session import Session
from datadist.control.turns import (
    CREDIT_SECONDS,
    MAX_ORIGINS,
    MAX_REST_SECONDS,
    MEAN_WAIT_SECONDS,
    SHARE_FRAMES,
    Credit,
    Credits,
)
from tests.waiting import until

SECONDS = 60.0


class Talker:
    """A session, and a thread that writes to its other end without pause."""

    def __init__(self, reactor: Reactor, frame: bytes) -> None:
        ours, self._theirs = socket.socketpair()
        self.session = Session(reactor, ours)
        self.frame = frame
        self.handled = 0
        self.session.on_message = self._count
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._talk)

    def _count(self, _session: Session, _message: Message, _fds: list[int]) -> None:
        self.handled += 1

    def say(self, frames: int) -> None:
        """Frames that lie there at once."""
        self._theirs.sendall(self.frame * frames)

    def talk(self) -> None:
        """Begin to talk without pause."""
        self._theirs.settimeout(0.05)
        self._thread.start()

    def _talk(self) -> None:
        many = memoryview(self.frame * 200)
        at = 0
        while not self._end.is_set():
            try:
                at = (at + self._theirs.send(many[at:])) % len(many)
            except TimeoutError:
                continue
            except OSError:
                return

    def close(self) -> None:
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join(SECONDS)
        self._theirs.close()


@pytest.fixture
def talker(reactor: Reactor) -> Iterator[Talker]:
    made = Talker(reactor, encode(Idle()))
    with ExitStack() as stack:
        stack.callback(reactor.call, lambda: made.session.close("end"), SECONDS)
        stack.callback(made.close)
        yield made


@pytest.mark.parametrize("frame", [encode(Idle()), encode(Sync(id=1)), encode(Idle()) * 3])
def test_calls_and_timers_run_beside_a_peer_that_talks_without_pause(
    reactor: Reactor, talker: Talker, frame: bytes
) -> None:
    talker.frame = frame
    reactor.call(talker.session.start, SECONDS)
    talker.talk()
    until(lambda: talker.handled > 1000)
    fired = threading.Event()
    reactor.call(lambda: reactor.later(0.01, fired.set), SECONDS)
    assert fired.wait(SECONDS)
    before = talker.handled
    until(lambda: talker.handled > before + 1000)


def test_another_session_has_its_turn_after_a_share(reactor: Reactor, talker: Talker) -> None:
    other = Talker(reactor, encode(Idle()))
    seen: list[int] = []
    other.session.on_message = lambda *_: seen.append(talker.handled)
    try:

        def start() -> None:  # both are there before either is looked at
            talker.say(40 * SHARE_FRAMES)
            other.say(1)
            talker.session.start()
            other.session.start()

        reactor.call(start, SECONDS)
        until(lambda: bool(seen))
        assert seen[0] <= 2 * SHARE_FRAMES
        until(lambda: talker.handled == 40 * SHARE_FRAMES)
    finally:
        other.close()
        reactor.call(lambda: other.session.close("end"), SECONDS)


def test_what_is_left_in_the_inbox_is_handled_although_nothing_more_arrives(
    reactor: Reactor, talker: Talker
) -> None:
    count = 10 * SHARE_FRAMES + 3
    talker.say(count)
    reactor.call(talker.session.start, SECONDS)
    until(lambda: talker.handled == count)
    until(talker.session.settled)


def test_frames_that_wait_in_the_inbox_are_not_settled(reactor: Reactor, talker: Talker) -> None:
    """The socket is empty, but what was read waits for its turn."""
    settled: list[tuple[bool, int]] = []

    def look() -> None:
        settled.append((talker.session.settled(), talker.handled))

    count = 3 * SHARE_FRAMES

    def start() -> None:
        talker.say(count)
        talker.session.start()

    def handle(*_: object) -> None:
        talker.handled += 1
        if talker.handled % SHARE_FRAMES == 1:
            reactor.post(look)

    talker.session.on_message = handle
    reactor.call(start, SECONDS)
    until(lambda: talker.handled == count and talker.session.settled())
    reactor.call(lambda: None, SECONDS)
    early = [good for good, handled in settled if handled < count]
    assert early
    assert not any(early)


def test_drain_handles_what_had_arrived_and_not_what_comes_meanwhile(
    reactor: Reactor, talker: Talker
) -> None:
    talker.say(100)

    def handle(*_: object) -> None:  # every frame is answered by another one
        talker.handled += 1
        talker.say(1)

    talker.session.on_message = handle
    reactor.call(talker.session.drain, SECONDS)
    assert 100 <= talker.handled < 1000


def test_who_waits_for_what_has_arrived_does_not_wait_for_what_comes_after(
    reactor: Reactor, talker: Talker
) -> None:
    reactor.call(talker.session.start, SECONDS)
    talker.talk()
    until(lambda: talker.handled > 1000)
    for _ in range(5):
        talker.session.catch_up(SECONDS)


def test_waiting_ends_with_the_session(reactor: Reactor, talker: Talker) -> None:
    reactor.call(talker.session.start, SECONDS)
    talker.talk()
    waiting = threading.Thread(target=lambda: talker.session.catch_up(SECONDS))
    waiting.start()
    reactor.call(lambda: talker.session.close("over"), SECONDS)
    waiting.join(SECONDS)
    assert not waiting.is_alive()
    talker.session.catch_up(SECONDS)


@pytest.mark.parametrize("how", ["exit", "broken"])
def test_a_peer_that_talks_without_pause_does_not_put_off_its_end(
    reactor: Reactor, talker: Talker, how: str
) -> None:
    """Its process ended, say, but a child goes on writing to the connection."""
    closed: list[str] = []
    talker.session.on_closed = lambda _session, reason: closed.append(reason)
    reactor.call(talker.session.start, SECONDS)
    talker.talk()
    until(lambda: talker.handled > 1000)
    end = talker.session._on_exit if how == "exit" else lambda _: talker.session._give_up("gone")
    reactor.call(lambda: end(0), SECONDS)
    until(lambda: bool(closed))
    assert closed == ["its process ended" if how == "exit" else "gone"]


def test_a_session_that_is_not_silent_earns_no_more_than_its_part() -> None:
    credit = Credit()
    assert credit.spend(CREDIT_SECONDS / 2) == 0
    assert credit.spend(CREDIT_SECONDS) > 0
    assert credit.spend(1.0) >= 1.0


@given(cost=st.floats(1e-6, 10.0))
def test_others_hardly_wait_for_who_has_no_credit(cost: float) -> None:
    credit = Credit(0.0)
    rest = credit.spend(cost)
    assert 1.999 * cost <= rest <= max(2.001 * cost, MAX_REST_SECONDS)
    if rest < MAX_REST_SECONDS:
        assert cost * cost / (2 * (cost + rest)) <= MEAN_WAIT_SECONDS


@pytest.mark.parametrize("origin", [(7, None), (None, "10.0.0.7")])
def test_sessions_of_one_origin_rest_one_after_another(
    origin: tuple[int | None, str | None],
) -> None:
    credits = Credits()
    credits.of(*origin).spend(CREDIT_SECONDS + 1)
    rests = [credits.of(*origin).spend(1.0) for _ in range(16)]
    assert all(later > earlier + 1.9 for earlier, later in itertools.pairwise(rests))
    assert credits.of(8, None).spend(CREDIT_SECONDS / 2) == 0


def test_who_comes_again_has_no_new_credit() -> None:
    credits = Credits()
    assert credits.of(7, None).spend(CREDIT_SECONDS) == 0
    assert credits.of(7, None).spend(CREDIT_SECONDS) > 0
    assert credits.of(8, None).spend(CREDIT_SECONDS / 2) == 0


def test_sessions_of_a_host_begin_with_what_it_has_and_do_not_share_it() -> None:
    credits = Credits()
    first, second = credits.of(None, "192.0.2.1"), credits.of(None, "192.0.2.1")
    assert first.spend(CREDIT_SECONDS / 2) == 0
    assert second.spend(CREDIT_SECONDS / 2) > 0
    assert first.spend(CREDIT_SECONDS / 4) == 0


def test_origins_that_are_remembered_are_few() -> None:
    credits = Credits()
    for number in range(1, 3 * MAX_ORIGINS):
        credits.of(number, None)
    assert len(credits._by_origin) == MAX_ORIGINS


@pytest.mark.parametrize(
    "error", [RuntimeError("can't start new thread"), MemoryError(), KeyError(1)]
)
def test_a_handler_that_raises_ends_its_session_with_the_reason(
    reactor: Reactor, talker: Talker, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    other = Talker(reactor, encode(Idle()))
    closed: list[str] = []

    def fail(*_: object) -> None:
        talker.handled += 1
        raise error

    talker.session.on_message = fail
    talker.session.on_closed = lambda _session, reason: closed.append(reason)
    try:
        reactor.call(talker.session.start, SECONDS)
        reactor.call(other.session.start, SECONDS)
        talker.say(3)
        until(lambda: bool(closed))
        other.say(3)
        until(lambda: other.handled == 3)
    finally:
        other.close()
        reactor.call(lambda: other.session.close("end"), SECONDS)
    assert talker.handled == 1, "the frame is not handled again"
    assert closed == [f"its idle could not be handled: {type(error).__name__}: {error}"]
    assert "could not be handled" in caplog.text


def test_a_frame_that_costs_much_is_followed_by_a_rest(
    reactor: Reactor, talker: Talker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread is free for most of the time, however little of a turn one frame is."""

    def burn(*_: object) -> None:
        end = time.thread_time() + 0.1
        while time.thread_time() < end:
            pass
        talker.handled += 1

    monkeypatch.setattr(turns, "MAX_REST_SECONDS", 0.15)
    talker.session.credit = Credit(0.2)
    talker.session.on_message = burn
    talker.say(8)
    began = time.monotonic()
    reactor.call(talker.session.start, SECONDS)
    until(lambda: talker.handled == 8)
    assert time.monotonic() - began > 0.95, "0.8 s of work, of which 0.2 s came without a rest"
    assert len(talker.frame) == HEADER.size + 15


def test_messages_that_a_peer_leaves_unread_are_limited(
    reactor: Reactor, talker: Talker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of small ones the object costs more than its bytes."""
    monkeypatch.setattr(sessions, "MAX_QUEUED_FRAMES", 5)
    closed: list[str] = []
    talker.session.on_closed = lambda _session, reason: closed.append(reason)
    while not closed:
        talker.session.send(Idle())
        reactor.call(lambda: None, SECONDS)
    assert closed == ["it left 6 messages unread, more than 5"]

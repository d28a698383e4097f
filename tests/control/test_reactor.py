"""The thread that waits for everything: its timers, and its end."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from datadist.control import reactor as reactors
from datadist.control.reactor import READ, WRITE, Reactor
from tests.waiting import until

SECONDS = 60.0


def test_a_timer_in_the_far_future_keeps_it_alive() -> None:
    reactor = Reactor("far")
    try:
        for _ in range(2):
            reactor.call(lambda: reactor.later(3e6, lambda: None), SECONDS)
        assert reactor.call(lambda: 7, SECONDS) == 7
    finally:
        reactor.stop()


def test_the_end_of_what_is_watched_is_told_as_what_was_asked_for(reactor: Reactor) -> None:
    told: list[int] = []
    reading, writing = os.pipe()
    others, full = os.pipe()
    os.set_blocking(full, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(full, bytes(4096))

    def watch() -> None:
        for fd, events in ((reading, READ), (full, WRITE)):

            def tell(events: int, fd: int = fd) -> None:
                told.append(events)
                reactor.unwatch(fd)

            reactor.watch(fd, events, tell)

    reactor.call(watch, SECONDS)
    os.close(writing)
    until(lambda: told == [READ])
    os.close(others)
    until(lambda: told == [READ, WRITE])
    for fd in (reading, full):
        os.close(fd)


def test_what_was_closed_before_can_be_forgotten(reactor: Reactor) -> None:
    reading, writing = os.pipe()
    reactor.call(lambda: reactor.watch(reading, READ, lambda _events: None), SECONDS)
    os.close(reading)
    reactor.call(lambda: reactor.unwatch(reading), SECONDS)
    reactor.call(lambda: reactor.unwatch(reading), SECONDS)
    os.close(writing)
    reactor.stop()
    reactor.unwatch(reading)
    assert not reactor._watched


def test_what_is_posted_after_the_end_touches_no_other_file(tmp_path: Path) -> None:
    reactor = Reactor("ended")
    reactor.stop()
    path = tmp_path / "file"
    fds = [os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(64)]
    try:
        reactor.post(lambda: None)
        assert path.read_bytes() == b""
    finally:
        for fd in fds:
            os.close(fd)


def test_once_abandoned_nobody_waits_for_what_another_thread_held() -> None:
    reactor = Reactor("forked")
    reactor.stop()
    held = threading.Event()
    release = threading.Event()

    def hold() -> None:
        with reactor._waking:
            held.set()
            release.wait(60.0)

    holder = threading.Thread(target=hold)
    poster = threading.Thread(target=reactor.post, args=(lambda: None,))
    holder.start()
    try:
        assert held.wait(30.0)
        poster.start()
        poster.join(30.0)
        assert not poster.is_alive()
    finally:
        release.set()
        holder.join()
        poster.join()


def test_calls_do_not_wait_for_a_reactor_that_was_stopped() -> None:
    reactor = Reactor("test")
    busy, go_on, answers = threading.Event(), threading.Event(), []

    def call() -> None:
        try:
            reactor.call(lambda: None, 60)
        except TimeoutError as error:
            answers.append(str(error))

    def block() -> None:
        busy.set()
        go_on.wait(20)

    reactor.post(block)
    assert busy.wait(20)
    reactor._stopping = True  # what is posted now comes too late
    waiting = threading.Thread(target=call)
    waiting.start()
    go_on.set()
    reactor.stop()
    waiting.join(20)
    call()
    assert answers == ["the control thread of this engine has ended"] * 2


def test_a_call_that_nobody_waits_for_any_more_does_not_run() -> None:
    reactor = Reactor("test")
    go_on, ran = threading.Event(), []
    reactor.post(lambda: go_on.wait(20))
    try:
        with pytest.raises(TimeoutError, match="did not answer within"):
            reactor.call(lambda: ran.append("late"), 0.05)
        go_on.set()
        assert reactor.call(lambda: list(ran), 20) == []
    finally:
        go_on.set()
        reactor.stop()


def _raise(*_: object) -> None:
    raise RuntimeError("a defect")


@pytest.mark.parametrize("where", ["posted", "timer", "event"])
def test_what_raises_ends_nothing_else(where: str, caplog: pytest.LogCaptureFixture) -> None:
    reactor = Reactor("test")
    readable = os.eventfd(1)

    def raise_once(events: int) -> None:
        reactor.unwatch(readable)
        _raise(events)

    try:
        if where == "posted":
            reactor.post(_raise)
        elif where == "timer":
            reactor.call(lambda: reactor.later(0.0, _raise), 20)
        else:
            reactor.call(lambda: reactor.watch(readable, READ, raise_once), 20)
        seen = threading.Event()
        reactor.call(lambda: reactor.later(0.01, seen.set), 20)
        assert seen.wait(20), "the thread goes on"
        assert "a defect" in caplog.text
    finally:
        reactor.stop()
        os.close(readable)


def test_what_a_call_raises_is_for_who_called() -> None:
    reactor = Reactor("test")
    try:
        with pytest.raises(RuntimeError, match="a defect"):
            reactor.call(_raise, 20)
        assert reactor.call(lambda: 7, 20) == 7
    finally:
        reactor.stop()


def test_timers_run_in_the_order_of_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """All begin at one time, and all are due at another one."""
    now = [time.monotonic()]
    monkeypatch.setattr(reactors, "time", SimpleNamespace(monotonic=lambda: now[0]))
    reactor = Reactor("test")
    ran: list[float] = []
    done = threading.Event()

    def start() -> None:
        for delay in (0.3, 0.1, 0.2):
            reactor.later(delay, lambda delay=delay: ran.append(delay))  # type: ignore[misc]
        reactor.later(0.15, lambda: ran.append(0.15)).cancel()
        reactor.later(0.4, done.set)

    try:
        reactor.call(start, 20)
        assert ran == []
        now[0] += 1.0
        reactor.call(lambda: None, 20)
        assert done.wait(20)
        assert ran == [0.1, 0.2, 0.3]
    finally:
        reactor.stop()


def test_what_is_awaited_comes_with_the_turn_that_brings_it(reactor: Reactor) -> None:
    there, heard = list[int](), list[str]()

    def begin() -> None:
        reactor.when(lambda: bool(there), lambda: heard.append("one"), SECONDS)
        reactor.when(lambda: len(there) > 1, lambda: heard.append("two"), SECONDS)

    reactor.call(begin, SECONDS)
    assert heard == []
    reactor.call(lambda: there.append(1), SECONDS)
    reactor.call(lambda: None, SECONDS)
    assert heard == ["one"]
    there.append(2)
    assert reactor.call_when(lambda: len(there) > 1, SECONDS, lambda: len(heard), SECONDS) == 2


def test_what_does_not_come_is_awaited_within_its_limit_only(reactor: Reactor) -> None:
    assert not reactor.wait_until(lambda: False, 0.05)
    assert reactor.call_when(lambda: False, 0.05, lambda: 7, SECONDS) == 7


def test_what_came_keeps_no_timer(reactor: Reactor) -> None:
    for _ in range(200):
        assert reactor.call_when(lambda: True, SECONDS, lambda: 7, SECONDS) == 7
    assert sum(timer.call is not None for _, _, timer in reactor._timers) == 0


def test_a_condition_that_raises_ends_nothing_else(
    reactor: Reactor, caplog: pytest.LogCaptureFixture
) -> None:
    def raise_it() -> bool:
        raise ValueError("no condition")

    reactor.post(lambda: reactor.when(raise_it, lambda: None, 0.05))
    assert reactor.wait_until(lambda: "no condition" in caplog.text, SECONDS)
    assert reactor.call(lambda: 7, SECONDS) == 7


def test_other_threads_post_what_ends_a_wait(reactor: Reactor) -> None:
    there: list[int] = []

    def bring() -> None:
        there.append(1)
        reactor.post(lambda: None)

    thread = threading.Timer(0.05, bring)
    thread.start()
    assert reactor.wait_until(lambda: bool(there), SECONDS)
    thread.join()

"""The threads for the heavy steps of linking."""

from __future__ import annotations

import threading
import time
import weakref

import pytest

from datadist.base.workers import Workers
from tests.waiting import until


class Link:
    """Something that a step uses."""


def test_an_idle_worker_keeps_nothing_of_its_last_step() -> None:
    workers = Workers(1, "idle")
    try:
        link, done = Link(), threading.Event()
        seen = weakref.ref(link)
        workers.submit(lambda link=link: done.set())  # type: ignore[misc]
        del link
        assert done.wait(30.0)
        deadline = time.monotonic() + 30.0
        while seen() is not None and time.monotonic() < deadline:
            time.sleep(0.001)
        assert seen() is None
    finally:
        workers.stop()


SECONDS = 60.0


def _blocked(workers: Workers, owner: str, calls: int) -> tuple[threading.Event, list[int]]:
    """Calls of one owner that wait for an event, and how many of them have begun."""
    go_on, begun = threading.Event(), list[int]()

    def wait() -> None:
        begun.append(1)
        go_on.wait(SECONDS)

    for _ in range(calls):
        workers.submit(wait, owner)
    return go_on, begun


@pytest.mark.parametrize("owner", ["another", None])
def test_one_owner_does_not_occupy_all_threads(owner: str | None) -> None:
    workers, done = Workers(3, "fair", 2), threading.Event()
    go_on, begun = _blocked(workers, "greedy", 50)
    try:
        until(lambda: len(begun) == 2)
        workers.submit(done.set, owner)
        assert done.wait(SECONDS)
        assert len(begun) == 2
    finally:
        go_on.set()
        workers.stop(SECONDS)
    assert len(begun) == 50, "what was submitted is finished"


def test_the_end_of_a_call_wakes_no_thread_that_has_nothing_to_do() -> None:
    workers, waits, ran = Workers(3, "asleep"), list[int](), list[int]()
    wait, calls = workers._ready.wait, 20

    def noted(timeout: float | None = None) -> bool:
        waits.append(1)
        return wait(timeout)

    def asleep() -> int:
        return len(workers._ready._waiters)  # type: ignore[attr-defined]

    try:
        until(lambda: asleep() == 3)
        workers._ready.wait = noted  # type: ignore[method-assign]
        for number in range(calls):
            workers.submit(lambda: ran.append(1))
            until(lambda number=number: len(ran) > number and asleep() == 3)  # type: ignore[misc]
        assert len(waits) == calls
    finally:
        workers.stop(SECONDS)


def test_owners_that_wait_take_turns() -> None:
    workers, ran = Workers(1, "fair"), list[str]()
    go_on, begun = _blocked(workers, "first", 1)
    until(lambda: bool(begun))
    for owner in "aaaabbc":
        workers.submit(lambda owner=owner: ran.append(owner), owner)  # type: ignore[misc]
    go_on.set()
    workers.stop(SECONDS)
    assert "".join(ran) == "abcabaa"


def _alive(name: str) -> int:
    """Threads of workers of that name; those of an earlier test may still be ending."""
    return sum(thread.name.startswith(f"{name}-") for thread in threading.enumerate())


def test_all_threads_start_at_once_and_none_later() -> None:
    workers = Workers(3, "early")
    assert _alive("early") == 3
    go_on, _ = _blocked(workers, "greedy", 9)
    assert _alive("early") == 3
    go_on.set()
    workers.stop(SECONDS)
    assert _alive("early") == 0


def test_the_end_does_not_wait_for_ever_for_each_thread() -> None:
    workers = Workers(3, "hung", 3)
    go_on, begun = _blocked(workers, "hung", 3)
    until(lambda: len(begun) == 3)
    began = time.monotonic()
    workers.stop(0.3)
    assert time.monotonic() - began < SECONDS / 2
    go_on.set()


def test_where_a_thread_cannot_start_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    real, started = threading.Thread.start, list[int]()

    def start(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(1)
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        Workers(3, "refused")
    assert _alive("refused") == 0


def test_what_raises_does_not_take_its_owner_s_place(caplog: pytest.LogCaptureFixture) -> None:
    workers, done = Workers(2, "raising", 1), threading.Event()

    def fail() -> None:
        raise RuntimeError("a defect")

    workers.submit(fail, "owner")
    workers.submit(done.set, "owner")
    assert done.wait(SECONDS)
    workers.stop(SECONDS)
    assert "a defect" in caplog.text

"""Calls inside of calls, and calls that go on where they are interrupted (calls.py)."""

from __future__ import annotations

import sys
import threading

import pytest

from datadist.base.calls import CallThread, Ended, Outcome, apart, begin, entries, inside_call
from tests.interrupts import Interrupt, raising


@entries
class _Api:
    def outer(self) -> None:
        self.step()

    def step(self) -> None:
        begin("step")

    def _helper(self) -> bool:
        return inside_call(sys._getframe())


def test_a_call_inside_of_another_one_is_refused() -> None:
    _Api().step()
    with pytest.raises(RuntimeError, match="step was called while this thread is inside another"):
        _Api().outer()
    assert not _Api()._helper()


def test_another_thread_is_not_inside() -> None:
    found: list[bool] = []

    class Caller(_Api):
        def step(self) -> None:
            thread = threading.Thread(target=lambda: found.append(self._helper()))
            thread.start()
            thread.join(30)
            found.append(self._helper())

    Caller().outer()
    assert found == [False, True]


def test_a_call_goes_on_where_its_caller_is_interrupted() -> None:
    thread, rounds = CallThread("test-calls"), 0
    done: list[None] = []
    for _ in raising(lambda: thread.call(lambda: done.append(None)), Interrupt):
        rounds += 1
        assert thread.call(lambda: "next") == "next"
        assert len(done) <= rounds
    assert len(done) >= rounds // 2
    thread.stop()
    assert not thread._thread.is_alive()
    with pytest.raises(Ended):
        thread.call(lambda: None)


def test_what_waits_when_the_thread_ends_is_told() -> None:
    thread, begun, go = CallThread("test-calls"), threading.Event(), threading.Event()

    def block() -> bool:
        begun.set()
        return go.wait(30)

    first, second = Outcome(block), Outcome(lambda: True)
    thread.submit(first)
    assert begun.wait(30)
    thread.submit(second)
    thread.close()
    go.set()
    assert first.result()
    with pytest.raises(Ended):
        second.result()
    thread.join()


def test_what_was_given_up_does_not_run() -> None:
    ran: list[None] = []
    outcome = Outcome(lambda: ran.append(None))
    assert outcome.claim()
    outcome.run()
    assert not ran
    other = Outcome(lambda: ran.append(None))
    other.run()
    assert not other.claim()


@pytest.mark.parametrize("refuse", [False, True])
def test_a_call_apart_returns_and_raises(refuse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    if refuse:
        monkeypatch.setattr(threading.Thread, "start", no_thread)
    assert apart(lambda: 5, "test-apart") == 5
    with pytest.raises(ZeroDivisionError):
        apart(lambda: 1 // 0, "test-apart")

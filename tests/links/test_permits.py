"""Permits: how many are out at a time, in which order those get one who wait, and what is never lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from datadist.links.permits import MAX_PERMITS, NON_BLOCKING, NOT_FREE, Permits
from tests import interrupts
from tests.waiting import SECONDS, until


def _take(permits: Permits, timeout: float = SECONDS) -> bool:
    taken: list[bool] = []
    permits.take(taken, timeout)
    return taken == [True]


def _start(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("count", [1, 3, 16])
def test_there_are_as_many_as_were_asked_for(count: int) -> None:
    permits = Permits(count)
    assert all(_take(permits, 0) for _ in range(count))
    assert permits.taken == count
    assert not _take(permits, 0)
    with pytest.raises(NOT_FREE):
        list(map(permits.take_now, NON_BLOCKING))
    permits.release()
    assert _take(permits, 0)


def test_there_are_never_more_than_the_most() -> None:
    assert Permits(10**9).count == MAX_PERMITS


@pytest.mark.parametrize("count", [1, 3])
def test_who_waits_gets_one_in_the_order_of_arrival(count: int) -> None:
    permits, order = Permits(count), list[int]()
    taken: list[bool] = []
    permits.take_all(taken, time.monotonic() + SECONDS)

    def wait(number: int) -> None:
        assert _take(permits)
        order.append(number)

    threads = []
    for number in range(8):
        threads.append(_start(lambda number=number: wait(number)))  # type: ignore[misc]
        until(lambda number=number: len(permits.line) == number + 1)  # type: ignore[misc]
    for number in range(8):
        permits.release()
        until(lambda number=number: len(order) == number + 1)  # type: ignore[misc]
    for thread in threads:
        thread.join(SECONDS)
    assert order == list(range(8))


class _Line(dict[int, threading.Lock]):
    """Notes how many rounds of others pass while the thread that made it stands in the line."""

    def __init__(self, rounds: Callable[[], int]) -> None:
        super().__init__()
        self.passed: list[int] = []
        self._rounds, self._before = rounds, 0
        self._thread = threading.get_ident()

    def __setitem__(self, arrival: int, bell: threading.Lock) -> None:
        super().__setitem__(arrival, bell)
        if threading.get_ident() == self._thread:
            self._before = self._rounds()

    def pop(self, arrival: int, *default: Any) -> Any:
        if threading.get_ident() == self._thread:
            self.passed.append(self._rounds() - self._before)
        return super().pop(arrival, *default)


@pytest.mark.parametrize("count", [1, 2])
def test_nobody_starves_beside_those_who_take_one_again_at_once(count: int) -> None:
    permits, over = Permits(count), threading.Event()
    line = permits.line = _Line(lambda: sum(rounds))
    rounds = [0] * count

    def greedy(number: int) -> None:
        while not over.is_set():
            assert _take(permits)
            time.sleep(0.001)  # lets the others run, as a transfer does
            rounds[number] += 1
            permits.release()

    threads = [_start(lambda number=number: greedy(number)) for number in range(count)]  # type: ignore[misc]
    try:
        until(lambda: all(rounds))
        deadline = time.monotonic() + SECONDS
        while len(line.passed) < 5:
            assert time.monotonic() < deadline
            assert _take(permits)
            permits.release()
        assert max(line.passed) <= 10 * count
    finally:
        over.set()
        for thread in threads:
            thread.join(SECONDS)
    assert permits.taken == 0


def test_one_who_gives_up_keeps_nobody_behind_him_waiting() -> None:
    permits = Permits()
    taken: list[bool] = []
    permits.take(taken, 0)
    first = _start(lambda: _take(permits, 0.5))
    until(lambda: len(permits.line) == 1 or not first.is_alive())
    got: list[bool] = []
    second = _start(lambda: got.append(_take(permits)))
    first.join(SECONDS)
    until(lambda: len(permits.line) == 1)
    permits.release()
    second.join(SECONDS)
    assert got == [True]
    assert not permits.line


@pytest.mark.parametrize("free", [True, False])
def test_an_exception_of_a_handler_at_any_moment_loses_none(free: bool) -> None:
    permits = Permits(2)

    def call() -> None:
        others: list[bool] = []
        taken: list[bool] = []
        try:
            if not free:
                others += map(permits.take_now, (False,) * 2)
            permits.take(taken, 0.001)
        finally:
            for _ in others + taken:
                permits.release()

    rounds = 0
    for where in interrupts.raising(call, interrupts.Interrupt):
        rounds += 1
        assert permits.taken == 0, where
        assert not permits.line, where
    assert rounds > 2


def test_all_can_be_taken_as_far_as_they_come_in_time() -> None:
    permits, taken = Permits(4), list[bool]()
    assert _take(permits, 0)
    permits.take_all(taken, time.monotonic() + 0.01)
    assert taken == [True] * 3
    permits.release()
    permits.take_all(taken, time.monotonic() + SECONDS)
    assert taken == [True] * 4


def test_what_is_given_back_is_there_once_wherever_a_handler_raises() -> None:
    permits, taken = Permits(2), list[bool]()
    permits.take(taken, 0)

    rounds = 0
    for where in interrupts.raising(lambda: permits.give_back(taken), interrupts.Interrupt):
        rounds += 1
        assert permits.free == 2 - len(taken), where
        if not taken:
            permits.take(taken, 0)
    assert rounds > 1

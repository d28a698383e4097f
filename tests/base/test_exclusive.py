"""State that one thread changes at a time, whatever runs in between (exclusive.py)."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from datadist.base.exclusive import Exclusive
from tests.interrupts import Interrupt, meanwhile, raising


class _Account:
    """Two numbers that must be equal whenever somebody looks."""

    def __init__(self) -> None:
        self.state = Exclusive()
        self.one = self.two = 0
        self.added: set[int] = set()

    def add(self) -> None:
        self.one += 1
        assert self.one == self.two + 1, "somebody was in between"
        self.two += 1

    def note(self, number: int) -> None:
        self.added.add(number)


def test_a_change_inside_of_another_one_is_refused() -> None:
    account = _Account()
    with pytest.raises(RuntimeError, match="inside another call"):
        account.state.run(lambda: account.state.run(account.add))
    account.state.run(account.add)
    assert account.two == 1


@pytest.mark.parametrize("way", ["do", "post", "leave"])
def test_what_can_wait_comes_after_the_change_that_it_interrupted(way: str) -> None:
    account = _Account()
    for where in meanwhile(
        lambda: account.state.run(account.add), lambda: getattr(account.state, way)(account.add)
    ):
        account.state.run(lambda: None)
        assert account.one == account.two, where
    assert account.two > 50


@pytest.mark.parametrize("way", ["run", "do", "post"])
def test_an_exception_at_any_moment_lets_the_next_call_in(way: str) -> None:
    account = _Account()
    number = 0

    def call() -> None:
        getattr(account.state, way)(lambda: account.note(number))

    for where in raising(call):
        free = threading.Thread(target=lambda: account.state.run(lambda: account.note(-1)))
        free.start()
        free.join(20)
        assert not free.is_alive(), where
        assert -1 in account.added
        account.added.clear()
        number += 1
    assert number > 3


def test_what_was_asked_for_is_done_in_spite_of_an_exception() -> None:
    account = _Account()

    def asked() -> None:
        account.note(1)

    def fails() -> None:
        account.state.do(asked)
        raise Interrupt

    with pytest.raises(Interrupt):
        account.state.run(fails)
    assert account.added == {1}
    for where in raising(lambda: account.state.run(lambda: account.state.do(asked))):
        account.added.clear()
        account.state.do(asked)
        account.state.run(lambda: None)
        assert account.added == {1}, where


def test_post_waits_for_nobody() -> None:
    account = _Account()
    inside, go_on = threading.Event(), threading.Event()

    def long() -> None:
        inside.set()
        go_on.wait(60)

    holder = threading.Thread(target=lambda: account.state.run(long))
    holder.start()
    inside.wait(60)
    account.state.post(lambda: account.note(1))
    assert not account.added
    go_on.set()
    holder.join(60)
    assert account.added == {1}


def test_threads_take_turns() -> None:
    account = _Account()
    ways: list[Callable[[Callable[[], object]], object]] = [
        account.state.run, account.state.do, account.state.post, account.state.do,
    ]  # fmt: skip

    def work(way: Callable[[Callable[[], object]], object]) -> None:
        for _ in range(2000):
            way(account.add)

    threads = [threading.Thread(target=work, args=(way,)) for way in ways]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    account.state.run(lambda: None)
    assert account.one == account.two == 8000


def test_who_made_its_change_does_not_go_on_for_others() -> None:
    account = _Account()
    handed: list[Callable[[], None]] = []
    account.state.hand_over = handed.append

    def asks_for_more() -> None:
        account.add()
        if account.one < 1000:
            account.state.post(asks_for_more)

    for way in (account.state.post, account.state.do, account.state.run):
        before = account.one
        way(asks_for_more)
        assert account.one < before + 10
    while handed:
        handed.pop()()
    assert account.one == account.two >= 1000


def test_a_change_at_once_waits_for_nobody() -> None:
    account = _Account()
    assert account.state.run_at_once(account.add)
    held: list[bool] = []

    def meanwhile_elsewhere() -> None:
        thread = threading.Thread(
            target=lambda: held.append(account.state.run_at_once(account.add))
        )
        thread.start()
        thread.join()
        held.append(account.state.run_at_once(account.add))  # and inside of one's own change

    account.state.run(meanwhile_elsewhere)
    account.state.leave(account.add)
    held.append(account.state.run_at_once(account.add))
    assert held == [False, False, False]
    assert account.one == 1
    account.state.run(lambda: None)
    assert account.one == 2


def test_a_change_at_once_leaves_what_its_thread_was_asked_for_meanwhile_to_another_call() -> None:
    account = _Account()
    assert not account.state.run_at_once(lambda: account.state.do(account.add)), "not all is done"
    assert account.one == 0
    account.state.run(lambda: None)
    assert account.one == account.two == 1

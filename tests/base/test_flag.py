"""The event that handlers of signals may wait for (flag.py)."""

from __future__ import annotations

import threading

import pytest

from datadist.base.flag import Flag
from tests.interrupts import Interrupt, meanwhile, raising


def test_all_who_wait_are_woken_and_nobody_waits_afterwards() -> None:
    flag, woken = Flag(), []
    threads = [threading.Thread(target=lambda: woken.append(flag.wait(30))) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert not flag.is_set()
    assert not flag.wait(0)
    flag.set()
    flag.set()
    for thread in threads:
        thread.join(30)
    assert woken == [True] * 3
    assert flag.wait(None)


def test_an_interrupted_wait_leaves_a_flag_that_works() -> None:
    flag = Flag()
    for _ in raising(lambda: flag.wait(0), Interrupt):
        assert not flag.wait(0)
        assert not flag._waiting
    thread = threading.Thread(target=flag.set)
    thread.start()
    assert flag.wait(30)
    thread.join(30)


@pytest.mark.parametrize("action", ["wait", "set"])
def test_a_handler_inside_of_a_wait_may_wait_and_set(action: str) -> None:
    acted: list[Flag] = []
    flags = [Flag()]

    def act() -> None:
        acted.append(flags[0])
        acted[-1].set() if action == "set" else acted[-1].wait(0)

    def wait() -> None:
        flags[0] = Flag()
        flags[0].wait(0)

    for _ in meanwhile(wait, act):
        assert acted[-1].is_set() == (action == "set")

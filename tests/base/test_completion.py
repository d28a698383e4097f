"""The end of something that goes on by itself, and who is told of it (completion.py)."""

from __future__ import annotations

import logging
import os
import sys
import threading
from functools import partial

import pytest

from datadist.base.completion import Completion
from tests import interrupts


def test_who_waits_is_woken_and_who_asked_is_told_in_order() -> None:
    completion, told = Completion(), list[str]()
    completion.tell(lambda: told.append("first"))
    completion.tell(lambda: told.append("second"))
    assert not completion.has_come()
    assert not completion.wait(0)
    thread = threading.Thread(target=completion.come)
    thread.start()
    assert completion.wait(60)
    thread.join()
    assert told == ["first", "second"]
    completion.tell(lambda: told.append("at once"))
    completion.come()
    assert told == ["first", "second", "at once"]


def test_what_one_raises_concerns_no_other(caplog: pytest.LogCaptureFixture) -> None:
    completion, told = Completion(), list[str]()

    def fail() -> None:
        raise ValueError("no")

    completion.tell(fail)
    completion.tell(lambda: told.append("second"))
    with caplog.at_level(logging.ERROR, "datadist.transfer"):
        completion.come()
    assert told == ["second"]
    assert [record.getMessage() for record in caplog.records] == ["a callback of a task raised"]


def test_each_is_told_once_whoever_comes() -> None:
    for _ in range(50):
        completion, told = Completion(), list[int]()
        threads = [
            threading.Thread(target=completion.tell, args=(partial(told.append, n),))
            for n in range(8)
        ]
        for thread in threads[:4]:
            thread.start()
        completion.come()
        for thread in threads[4:]:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(told) == list(range(8))


def test_in_a_forked_child_it_has_come() -> None:
    completion, told = Completion(), list[str]()
    completion.tell(lambda: told.append("parent's"))
    ended = Completion()
    ended.come()
    pid = os.fork()
    if not pid:
        completion.tell(lambda: told.append("own"))
        good = told == ["own"]
        good = good and completion.forked and completion.has_come() and completion.wait(None)
        os._exit(0 if good and not ended.forked and ended.has_come() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not completion.has_come()


def test_what_ends_a_thread_keeps_nobody_from_being_told() -> None:
    """The caller gets it on its own thread; a thread of ours goes on."""
    completion, told = Completion(), list[str]()
    completion.tell(sys.exit)
    completion.tell(lambda: told.append("second"))
    with pytest.raises(SystemExit):
        completion.come()
    assert completion.has_come()
    completion.come_apart()
    assert told == ["second"]
    completion = Completion()
    completion.tell(sys.exit)
    completion.tell(lambda: told.append("apart"))
    completion.come_apart()
    assert told == ["second", "apart"]


def test_what_a_handler_of_a_signal_raises_passes_and_the_rest_is_told() -> None:
    def prepare() -> tuple[Completion, list[str]]:
        completion, told = Completion(), list[str]()
        completion.tell(lambda: told.append(str(1)))
        completion.tell(lambda: told.append(str(2)))
        return completion, told

    for kind in (interrupts.Interrupt, interrupts.Watchdog):
        rounds = 0
        for where, (completion, told) in interrupts.raising_anew(
            prepare, lambda state: state[0].come(), kind
        ):
            completion.come_apart()
            assert completion.wait(0), where
            assert told in (["1", "2"], ["2"], ["1"]), where  # at most the one that was interrupted
            rounds += 1
        assert rounds > 5

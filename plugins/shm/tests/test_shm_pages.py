"""Pages that are made in the background: all of a pool's and no others, until somebody says stop."""

from __future__ import annotations

import os
import threading
from array import array
from types import SimpleNamespace

import pytest
from datadist_shm import pages
from datadist_shm.pages import SLICE, Filling

from datadist.base.flag import Flag
from datadist.transport import RegistrationError
from tests.descriptors import is_open
from tests.waiting import until

SECONDS = 20.0


class Pool:
    """Notes which of its pages are made; each part may be made once ``may_go_on``."""

    def __init__(self, size: int, error: OSError | None = None) -> None:
        self.size = size
        self.parts: list[tuple[int, int]] = []
        """Begin and end."""
        self.begun, self.may_go_on = threading.Event(), threading.Event()
        self._error = error
        self.stop = array("q", [0])
        self.nice = 0
        self.improved = False
        """Whether they were made faster, once all were there."""
        self.improving, self.may_end = threading.Event(), threading.Event()

    def improve(self, stop: array[int]) -> None:
        """Take as long as the test wants."""
        self.improving.set()
        assert self.may_end.wait(SECONDS)
        self.improved = not stop[0]

    def make(self, begin: int, size: int, stop: array[int]) -> None:
        """Make none, after a while."""
        self.stop = stop
        self.nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        self.begun.set()
        assert self.may_go_on.wait(SECONDS)
        if self._error is not None:
            raise self._error
        self.parts.append((begin, begin + size))


@pytest.mark.parametrize(
    "size", [1, SLICE - 1, SLICE, SLICE + 1, 2 * SLICE, 3 * SLICE - 4096], ids=str
)
def test_all_pages_of_a_pool_are_made_and_none_beyond(size: int) -> None:
    pool = Pool(size)
    filling = Filling(pool, pool)
    assert not filling.done
    pool.may_go_on.set()
    assert pool.improving.wait(SECONDS)
    assert filling.done
    pool.may_end.set()
    filling.wait(SECONDS)
    assert pool.improved
    ends = [0, *(end for _, end in pool.parts)]
    assert [begin for begin, _ in pool.parts] == ends[:-1], (
        "each part begins at the end of the last"
    )
    assert ends[-1] == size


def test_who_waits_for_huge_pages_waits_no_longer_than_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = Pool(SLICE)
    filling = Filling(pool, pool)
    pool.may_go_on.set()
    assert pool.improving.wait(SECONDS)
    waits: list[float] = []
    monkeypatch.setattr(Flag, "wait", lambda _flag, seconds: waits.append(seconds))
    for times in ((10.0, 13.0), (10.0, 15.0), (10.0, 10.0)):
        monkeypatch.setattr(pages, "time", SimpleNamespace(monotonic=iter(times).__next__))
        filling.wait(4.0 if times[1] > 10.0 else 300.0)
    assert waits == [4.0, 1.0, 4.0, 0.0, 300.0, pages.IMPROVE_SECONDS]
    monkeypatch.undo()
    pool.may_end.set()
    filling.wait(SECONDS)


def test_the_thread_that_needs_the_interpreter_keeps_the_priority_of_the_program() -> None:
    """Else all others would wait for it where it holds the GIL and has to wait for a processor."""
    pool = Pool(SLICE)
    filling = Filling(pool, pool)
    pool.may_go_on.set()
    pool.may_end.set()
    filling.wait(SECONDS)
    assert pool.nice == os.getpriority(os.PRIO_PROCESS, 0)


def test_nothing_else_begins_once_somebody_has_said_stop() -> None:
    """Nobody waits for threads that get no processor: the last one closes the file."""
    file = os.open(os.devnull, os.O_RDONLY)
    pool = Pool(3 * SLICE)
    filling = Filling(pool, pool)
    assert pool.begun.wait(SECONDS)
    filling.stop(file)
    assert pool.stop[0] == 1
    assert is_open(file)
    pool.may_go_on.set()
    until(lambda: not is_open(file))
    assert pool.parts == [(0, SLICE)]
    assert not filling.done


def test_who_says_stop_afterwards_closes_the_file() -> None:
    file = os.open(os.devnull, os.O_RDONLY)
    pool = Pool(SLICE)
    filling = Filling(pool, pool)
    pool.may_go_on.set()
    pool.may_end.set()
    filling.wait(SECONDS)
    assert pool.improved
    filling.stop(file)
    until(lambda: not is_open(file))


def test_pages_are_there_before_they_are_made_faster_and_stay_until_that_has_ended() -> None:
    file = os.open(os.devnull, os.O_RDONLY)
    pool = Pool(SLICE)
    filling = Filling(pool, pool)
    pool.may_go_on.set()
    assert pool.improving.wait(SECONDS)
    assert filling.done
    filling.stop(file)
    assert is_open(file)
    assert not filling.done
    pool.may_end.set()
    until(lambda: not is_open(file))
    assert not pool.improved
    assert filling._pages is None


def test_what_could_not_be_made_is_not_made_faster() -> None:
    pool = Pool(SLICE, OSError(12, "no memory"))
    filling = Filling(pool, pool)
    pool.may_go_on.set()
    filling._thread.join(SECONDS)
    assert not pool.improving.is_set()


def test_the_first_error_ends_the_filling() -> None:
    pool = Pool(3 * SLICE, OSError(12, "no memory"))
    filling = Filling(pool, pool)
    pool.may_go_on.set()
    with pytest.raises(RegistrationError, match="the pages of the pool cannot be had"):
        filling.wait(SECONDS)
    assert not filling.done

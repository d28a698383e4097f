"""The page of generation words: made once, with each scratch word for one read at a time."""

from __future__ import annotations

import threading
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, cast

import pytest

from datadist.grants.words import SCRATCH, Words
from datadist.transport import Placement, Region
from tests.interrupts import Interrupt, Watchdog, raising_anew

THREADS = 4


class _Memory:
    """Regions that are not there; a thread waits in the making for others, which may come."""

    def __init__(self, others: threading.Barrier | None = None) -> None:
        self._others = others

    def add_region(self, size: int, placement: Placement, _user: str) -> tuple[int, Region]:
        if self._others is not None:
            with suppress(threading.BrokenBarrierError):  # nobody else came
                self._others.wait(0.2)
        return 1, Region(1 << 30, size, placement)


def _words(memory: _Memory) -> Words:
    host = frozenset({Placement.HOST})
    capabilities = SimpleNamespace(host_addressable=host, placements=host)
    transport = SimpleNamespace(capabilities=capabilities)
    return Words(cast("Any", memory), cast("Any", transport))


def _check(words: Words, where: str = "") -> None:
    """Each scratch word can be taken once."""
    taken: list[int] = []
    for _ in range(SCRATCH + 1):
        words.take_scratch(taken)
    assert sorted(taken) == list(range(SCRATCH)), where
    assert words.region_id == 1


def test_threads_that_make_their_first_caches_share_one_page() -> None:
    words = _words(_Memory(threading.Barrier(THREADS)))
    threads = [threading.Thread(target=words.prepare) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    _check(words)


@pytest.mark.parametrize("kind", [Interrupt, Watchdog])
def test_a_page_whose_making_was_interrupted(kind: type[BaseException]) -> None:
    for where, words in raising_anew(lambda: _words(_Memory()), Words.prepare, kind):
        words.prepare()
        _check(words, where)

"""The page of generation words: made once, with each scratch word for one read at a time."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, cast

import pytest

from datadist.grants.words import SCRATCH, Words
from datadist.status import LLMException, LLMStatusCode
from datadist.transport import Placement, Region, TransportError
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


def _refuse(*_: object) -> None:
    raise TransportError("no such stream")


def _words(memory: Any, placements: Sequence[Placement] = (Placement.HOST,)) -> Words:
    capabilities = SimpleNamespace(host_addressable={Placement.HOST}, placements=set(placements))
    transport = SimpleNamespace(capabilities=capabilities, copy=_refuse)
    return Words(memory, cast("Any", transport))


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


class _Pages:
    """Regions that are there."""

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def add_region(self, size: int, placement: Placement, _user: str) -> tuple[int, Region]:
        self._kept.append(ctypes.create_string_buffer(size))
        return len(self._kept), Region(ctypes.addressof(self._kept[-1]), size, placement)


def test_a_device_that_does_not_take_a_word_is_named() -> None:
    words = _words(_Pages(), (Placement.HOST, Placement.DEVICE))
    words.prepare()
    with pytest.raises(LLMException, match="word cannot be written: no such stream") as caught:
        words.write(3, 2)
    assert caught.value.status_code is LLMStatusCode.LLM_FAILED

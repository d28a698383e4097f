"""Counting what goes over links: nothing is lost or counted twice, wherever an exception comes."""

from __future__ import annotations

import threading

from datadist.links.counters import Ledger, Tally
from tests.interrupts import meanwhile_anew, raising_anew


def _noted(operations: int) -> tuple[Ledger, list[Tally]]:
    ledger, links, total = Ledger(), [Tally(), Tally()], Tally()
    for number in range(operations):
        ledger.noted.append((number + 1, (links[number // 3 % 2], total), 10, 0.5))
    return ledger, [*links, total]


def _operations(tallies: list[Tally]) -> list[float]:
    return [tally.as_dict()["operations"] for tally in tallies]


def test_what_is_noted_is_added_up_by_link() -> None:
    ledger, tallies = _noted(10)
    assert _operations(tallies) == [0, 0, 0]
    ledger.add_up()
    ledger.add_up()
    assert _operations(tallies) == [6, 4, 10]
    assert tallies[2].as_dict() == {"operations": 10, "bytes": 100, "errors": 0, "seconds": 5.0}
    tallies[2].add_error(1.0)
    assert tallies[2].as_dict() == {"operations": 10, "bytes": 100, "errors": 1, "seconds": 6.0}


def _add_up(state: tuple[Ledger, list[Tally]]) -> None:
    state[0].add_up()


def test_each_operation_is_counted_once_wherever_an_exception_comes() -> None:
    for where, (ledger, tallies) in raising_anew(lambda: _noted(10), _add_up):
        ledger.noted.append((99, (tallies[0], tallies[2]), 10, 0.5))
        ledger.add_up()
        assert _operations(tallies) == [7, 4, 11], where
        assert not ledger.noted


def test_a_handler_of_a_signal_may_add_up_as_well() -> None:
    for where, (ledger, tallies) in meanwhile_anew(lambda: _noted(10), _add_up, _add_up):
        ledger.add_up()
        assert _operations(tallies) == [6, 4, 10], where


def test_threads_that_note_and_add_up_lose_nothing() -> None:
    ledger, tally = Ledger(), Tally()

    def note(first: int) -> None:
        for token in range(first, first + 2000):
            ledger.noted.append((token, (tally,), 1, 0.0))
            if len(ledger.noted) > 7:
                ledger.add_up()

    threads = [threading.Thread(target=note, args=(n * 10000 + 1,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ledger.add_up()
    assert tally.as_dict()["operations"] == 8000

"""What is kept for transfers that go on: until when, also where the transport errs."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from datadist.caches.block_ranges import BlockRanges
from datadist.caches.pool_config import PoolConfig
from datadist.caches.quarantine import Kept, Quarantine, Ranges
from datadist.transport import Placement
from tests import interrupts
from tests.caches.test_memory import FakeTransport, _memory


class Flight:
    """A transfer that settles when the test says so."""

    def __init__(self, answer: Callable[[], bool] = lambda: False) -> None:
        self.settled = answer


def _kept(flight: Flight, address: int = 4096, size: int = 100) -> Kept:
    return Kept(flight, Ranges(array("q", [address]), array("q", [size])), "link", 1, "a pull")


def test_a_transport_that_cannot_say_whether_it_has_settled_has_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    quarantine = Quarantine()
    flight = Flight(lambda: 1 / 0 > 1)
    quarantine.keep(_kept(flight))
    assert quarantine.release_settled()
    assert quarantine.touching(BlockRanges((4000,), 200)) is not None
    assert "defect of transport" in caplog.text
    flight.settled = lambda: True
    assert not quarantine.release_settled()
    assert quarantine.touching(BlockRanges((4000,), 200)) is None


def test_what_waits_is_told_once_also_when_others_ask_first() -> None:
    quarantine, told, flight = Quarantine(), list[str](), Flight()
    kept = _kept(flight)
    kept.release = lambda: told.append("released")
    quarantine.keep(kept)
    assert quarantine.defers(BlockRanges((4000,), 200), lambda: told.append("freed"))
    assert not quarantine.defers(BlockRanges((8000,), 200), lambda: told.append("never"))
    flight.settled = lambda: True
    assert quarantine.texts() == []
    assert quarantine.touching(BlockRanges((4000,), 200)) is None
    assert told == [], "only who releases tells, where no handler of a signal runs"
    assert not quarantine.release_settled()
    quarantine.release_settled()
    assert told == ["released", "freed"]


def test_an_exception_of_a_handler_while_it_is_asked_about_loses_nothing() -> None:
    quarantine, told = Quarantine(), list[str]()
    kept = _kept(Flight(lambda: True))
    kept.release = lambda: told.append("released")

    def ask() -> None:
        quarantine.touching(BlockRanges((4000,), 200))
        quarantine.texts()

    quarantine.keep(kept)
    for _ in interrupts.raising(ask, interrupts.Interrupt):
        pass
    quarantine.release_settled()
    assert told == ["released"]


@pytest.mark.parametrize("in_pool", [True, False])
def test_what_a_transfer_may_touch_when_the_engine_ends_is_not_released(in_pool: bool) -> None:
    transport = FakeTransport()
    memory = _memory(transport)
    memory.add_pool(Placement.DEVICE, PoolConfig(memory_size=2048, page_shift=10))
    memory.register([4096, 8192], 1024, Placement.DEVICE, "user")
    pool: tuple[int, int] = ((1 << 30), 2048)
    address: Any = pool[0] if in_pool else 4096
    memory.quarantine.keep(_kept(Flight(), address))
    memory.close()
    assert transport.live == ([pool] if in_pool else [(4096, 1024)])


_RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), min_size=1, max_size=8)


@given(
    _RANGES,
    st.lists(st.integers(0, 70), min_size=1, max_size=4),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 9),
)
@example([(10, 5)], [15], 5, 1, 0)
@example([(10, 5)], [5], 5, 1, 0)
@example([(10, 5)], [14], 1, 1, 0)
@example([(0, 12), (1, 1)], [11], 1, 1, 0)
@example([(2, 3)], [0], 2, 2, 3)
@example([(2, 4)], [0], 2, 2, 3)
def test_ranges_meet_the_blocks_that_one_of_them_overlaps(
    ranges: list[tuple[int, int]], bases: list[int], size: int, count: int, gap: int
) -> None:
    merged = Ranges(array("q", [a for a, _ in ranges]), array("q", [n for _, n in ranges]))
    touched = {byte for address, length in ranges for byte in range(address, address + length)}
    starts = [base + number * (size + gap) for base in bases for number in range(count)]
    asked = {byte for start in starts for byte in range(start, start + size)}
    nbytes = (count - 1) * (size + gap) + size
    assert merged.meet(BlockRanges(tuple(bases), nbytes, size + gap, size)) == bool(touched & asked)
    if not gap:
        assert merged.meet(BlockRanges(tuple(bases), nbytes)) == bool(touched & asked)
    assert merged.first == min(touched)
    assert merged.nbytes == sum(length for _, length in ranges)


def test_one_transfer_is_kept_once() -> None:
    quarantine, flight, told = Quarantine(), Flight(), list[int]()
    for number in range(2):
        kept = _kept(flight)
        kept.release = partial(told.append, number)
        quarantine.keep(kept)
    flight.settled = lambda: True
    assert not quarantine.release_settled()
    assert told == [0]


def test_whoever_waits_for_a_transfer_is_told_also_when_another_raises(
    caplog: pytest.LogCaptureFixture,
) -> None:
    quarantine, told, flight = Quarantine(), list[str](), Flight()
    kept = _kept(flight)
    kept.release = lambda: told.append("released")
    quarantine.keep(kept)

    def fails() -> None:
        raise RuntimeError("a defect")

    quarantine.defers(BlockRanges((4000,), 200), fails)
    quarantine.defers(BlockRanges((4000,), 200), lambda: told.append("freed"))
    flight.settled = lambda: True
    assert not quarantine.release_settled()
    assert told == ["released", "freed"]
    assert "a defect" in caplog.text

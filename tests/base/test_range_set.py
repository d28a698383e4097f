"""Unions of ranges (range_set.py)."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from datadist.base.range_set import RangeSet

NUMBERS = st.integers(0, 12)


@given(st.lists(st.tuples(NUMBERS, NUMBERS)), NUMBERS)
def test_ranges_cover_what_they_hold(ranges: list[tuple[int, int]], count: int) -> None:
    coverage, numbers = RangeSet(), set[int]()
    for start, stop in ranges:
        coverage.add(start, stop)
        numbers.update(range(start, stop))
        found = coverage.ranges
        assert {n for begin, end in found for n in range(begin, end)} == numbers
        assert all(begin < end for begin, end in found)
        assert all(end < begin for (_, end), (begin, _) in pairwise(found))
    assert coverage.is_all(count) == (bool(count) and numbers == set(range(count)))

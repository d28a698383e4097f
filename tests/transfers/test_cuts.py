"""Segments that are cut where regions meet: the same bytes, and none crosses such a place."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datadist.status import LLMException
from datadist.transfers import cuts
from datadist.transfers.cuts import cut
from datadist.transfers.plan import Segments, joined

PLACES = st.lists(st.integers(0, 150), max_size=10).map(lambda places: sorted(set(places)))


def _bytes(segments: Segments) -> list[tuple[int, int]]:
    vectors = (memoryview(v).tolist() for v in (segments.local, segments.remote, segments.length))
    return [(a + n, b + n) for a, b, length in zip(*vectors, strict=True) for n in range(length)]


def _segments(parts: list[tuple[int, int, int]]) -> Segments:
    local, remote, length = (array("q", each) for each in zip(*parts, strict=True))
    return Segments(local, remote, length, sum(length))


PARTS = st.lists(
    st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(1, 40)), min_size=1, max_size=8
)


@given(PARTS, PLACES, PLACES)
def test_the_same_bytes_in_the_same_order(
    parts: list[tuple[int, int, int]], local: list[int], remote: list[int]
) -> None:
    whole = _segments(parts)
    pieces = cut(whole, local, remote)
    assert _bytes(pieces) == _bytes(whole)
    assert pieces.nbytes == whole.nbytes
    vectors = (memoryview(v).tolist() for v in (pieces.local, pieces.remote, pieces.length))
    for mine, theirs, length in zip(*vectors, strict=True):
        assert length > 0
        assert not any(mine < place < mine + length for place in local)
        assert not any(theirs < place < theirs + length for place in remote)


def test_nothing_is_done_without_cuts() -> None:
    whole = _segments([(0, 0, 8)])
    assert cut(whole, (), ()) is whole


def test_a_peer_cannot_have_a_transfer_cut_into_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuts, "MAX_MORE", 20)
    segments = _segments([(n * 10, 0, 10) for n in range(5)])
    assert len(cut(segments, (), [2, 4, 6, 8])) == 25
    with pytest.raises(LLMException, match="25 places where registered ranges meet"):
        cut(segments, (), [2, 4, 6, 8, 9])


@given(st.lists(PARTS, min_size=1, max_size=4))
def test_plans_are_joined_in_order(plans: list[list[tuple[int, int, int]]]) -> None:
    whole = joined([_segments(parts) for parts in plans])
    assert _bytes(whole) == [pair for parts in plans for pair in _bytes(_segments(parts))]
    assert whole.nbytes == sum(length for parts in plans for _, _, length in parts)

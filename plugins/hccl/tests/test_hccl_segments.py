"""Segments against windows: what comes out covers the same bytes, each piece inside one window."""

from __future__ import annotations

import numpy as np
import pytest
from datadist_hccl.segments import Outside, Windows, pieces
from hypothesis import example, given
from hypothesis import strategies as st

Ranges = list[tuple[int, int]]
Segments = list[tuple[int, int, int]]


def _vector(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(numbers, np.int64)


@st.composite
def _ranges(draw: st.DrawFn) -> Ranges:
    """Windows, of which neighbours may touch."""
    at, found = 1, []
    for _ in range(draw(st.integers(1, 4))):
        at += draw(st.sampled_from([0, 0, 3]))
        size = draw(st.integers(1, 6))
        found.append((at, size))
        at += size
    return found


_segments = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 9)), min_size=1
)


@given(_ranges(), _ranges(), _segments)
@example([(1, 2), (3, 6)], [(1, 8)], [(1, 1, 8)])
@example([(1, 8)], [(1, 2), (3, 6)], [(1, 1, 8)])
@example([(1, 4), (5, 6)], [(11, 2), (13, 8)], [(1, 11, 8), (2, 12, 9)])
@example([(1, 3), (4, 3)], [(11, 3), (14, 3)], [(1, 11, 6)])
@example([(1, 8)], [(1, 4), (6, 4)], [(1, 1, 8)])
def test_pieces(ours: Ranges, theirs: Ranges, segments: Segments) -> None:
    mine, other = _bytes(ours), _bytes(theirs)
    wanted = [(a + i, b + i) for a, b, n in segments for i in range(n)]
    covered = all(a in mine and b in other for a, b in wanted)
    local, remote, length = (_vector(*column) for column in zip(*segments, strict=True))
    windows = Windows(ours), Windows(theirs)
    if not covered:
        with pytest.raises(Outside) as caught:
            pieces(local, remote, length, *windows)
        assert caught.value.address not in (mine if caught.value.local else other)
        return
    columns = pieces(local, remote, length, *windows)
    found = list(zip(*(column.tolist() for column in columns), strict=True))
    assert [(a + i, b + i) for a, b, n in found for i in range(n)] == wanted
    for a, b, n in found:
        assert any(start <= a and a + n <= start + size for start, size in ours)
        assert any(start <= b and b + n <= start + size for start, size in theirs)


def _bytes(ranges: Ranges) -> set[int]:
    return {start + i for start, size in ranges for i in range(size)}


def test_without_windows_everything_is_outside() -> None:
    one = _vector(1)
    with pytest.raises(Outside) as caught:
        pieces(one, one, one, Windows(()), Windows([(1, 5)]))
    assert caught.value.local
    assert not Windows(()).holds(1)
    assert Windows([(1, 5)]).holds(5)
    assert not Windows([(1, 5)]).holds(6)

"""Which segments travel in one message, and the copies."""

from __future__ import annotations

import ctypes
from array import array
from itertools import accumulate, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from datadist.messaging.pieces import MAX_SEGMENTS, Spans, cut, gather, scatter

lengths = st.lists(st.integers(1, 200), min_size=1, max_size=12)


@settings(deadline=None, max_examples=50)
@given(lengths, st.integers(1, 300))
def test_pieces_are_the_same_bytes_in_the_same_order(sizes: list[int], most: int) -> None:
    begins = [0, *accumulate(sizes)]
    segments = [(10**6 + at, 10**9 + 2 * at, n) for at, n in zip(begins, sizes, strict=False)]
    moved = [
        (local + byte, remote + byte)
        for piece in cut(segments, most)
        for local, remote, n in zip(piece.local, piece.remote, piece.length, strict=True)
        for byte in range(n)
    ]
    assert moved == [(a + byte, b + byte) for a, b, n in segments for byte in range(n)]


@settings(deadline=None, max_examples=50)
@given(lengths, st.integers(1, 300))
def test_pieces_are_full_but_the_last(sizes: list[int], most: int) -> None:
    *full, last = cut(((0, 0, n) for n in sizes), most)
    assert all(piece.size == sum(piece.length) == most for piece in full)
    assert 0 < last.size == sum(last.length) <= most


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 3 * MAX_SEGMENTS))
def test_pieces_have_a_limit_of_segments(count: int) -> None:
    pieces = list(cut(((0, 0, 1) for _ in range(count)), 1 << 20))
    assert [len(piece.length) for piece in pieces[:-1]] == [MAX_SEGMENTS] * (len(pieces) - 1)
    assert sum(len(piece.length) for piece in pieces) == count


def test_pieces_are_cut_when_they_are_needed() -> None:
    pieces = cut(((0, 0, 1 << 60) for _ in iter(int, 1)), 1 << 20)
    assert [next(pieces).size for _ in range(3)] == [1 << 20] * 3


@given(
    st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=2, max_size=12, unique=True).map(
        sorted
    ),
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.integers(-(1 << 63), (1 << 63) - 1),
)
def test_spans_contain_what_lies_in_one_range(edges: list[int], address: int, size: int) -> None:
    ranges = list(pairwise(edges))
    expected = size > 0 and any(a <= address and address + size <= b for a, b in ranges)
    assert Spans(ranges).contain(address, size) is expected


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 200_000), min_size=1, max_size=5), st.integers(0, 100))
def test_what_was_gathered_is_scattered_to_the_same_places(sizes: list[int], at: int) -> None:
    source, target = (
        [(ctypes.c_char * n).from_buffer(bytearray([fill]) * n) for n in sizes] for fill in (7, 0)
    )
    places = [array("q", map(ctypes.addressof, each)) for each in (source, target)]
    message = bytearray(at + sum(sizes))
    gather(message, at, places[0], sizes)
    scatter(bytes(message), at, places[1], sizes)
    assert message == bytearray(at) + bytearray([7]) * sum(sizes)
    assert [bytes(each) for each in target] == [bytes([7]) * n for n in sizes]

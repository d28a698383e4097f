"""Cutting transfers into pieces."""

from __future__ import annotations

import numpy as np
import pytest
from datadist_nixl.library import HOST, Kind
from datadist_nixl.memory import NixlRegion, Outside, Ranges, Vector
from datadist_nixl.segments import PIECE, Piece, pieces
from datadist_nixl.wire import MAX_SEGMENTS
from hypothesis import given
from hypothesis import strategies as st

from datadist.transport import Placement

GPU = Kind(("VRAM", 1))
HERE, THERE, SIZE = 1 << 40, 1 << 41, 1 << 30


def ours(*kinds: Kind) -> Ranges[NixlRegion]:
    """Regions that meet, one after another."""
    regions = [
        NixlRegion(HERE + i * SIZE, SIZE, Placement.HOST, kind) for i, kind in enumerate(kinds)
    ]
    return Ranges((r.address, r.size, r) for r in regions)


def theirs(*kinds: Kind) -> Ranges[Kind]:
    return Ranges((THERE + i * SIZE, SIZE, kind) for i, kind in enumerate(kinds))


def cut(
    rows: list[tuple[int, int, int]], own: Ranges[NixlRegion], other: Ranges[Kind]
) -> list[Piece]:
    local, remote, length = np.array(rows, np.int64).T
    return pieces(HERE + local, THERE + remote, length.copy(), own, other)


def as_bytes(found: list[Piece]) -> list[tuple[int, int]]:
    """Both addresses of every byte, for small transfers."""
    return [
        (a - HERE + i, b - THERE + i)
        for piece in found
        for a, b, n in zip(piece.local, piece.remote, piece.length, strict=True)
        for i in range(n)
    ]


def test_segments_that_continue_each_other_are_merged() -> None:
    (piece,) = cut([(0, 50, 10), (10, 60, 5), (20, 65, 5)], ours(HOST), theirs(HOST))
    np.testing.assert_array_equal(piece.length, [15, 5])


def test_large_segments_are_split() -> None:
    for rows in ([(0, 0, 3 * PIECE + 1)], [(0, 0, 3 * PIECE), (4 * PIECE, 0, 1)]):
        found = cut(rows, ours(HOST), theirs(HOST))
        assert [int(piece.length.sum()) for piece in found] == [PIECE, PIECE, PIECE, 1]
        assert found[1].local[0] == HERE + PIECE
        assert found[1].remote[0] == THERE + PIECE


def test_many_segments_make_several_pieces() -> None:
    rows = [(16 * i, 8 * i, 8) for i in range(2 * MAX_SEGMENTS + 1)]
    counts = [len(piece.length) for piece in cut(rows, ours(HOST), theirs(HOST))]
    assert counts == [MAX_SEGMENTS, MAX_SEGMENTS, 1]


def test_a_piece_has_memory_of_one_kind_at_each_end() -> None:
    rows = [(0, 0, 8), (SIZE, 8, 8), (SIZE + 8, SIZE, 8), (16, SIZE + 8, 8)]
    found = cut(rows, ours(HOST, GPU), theirs(HOST, GPU))
    assert [(piece.kind, piece.their_kind) for piece in found] == [
        (HOST, HOST), (GPU, HOST), (GPU, GPU), (HOST, GPU)
    ]  # fmt: skip


def test_regions_that_meet_are_kept_apart() -> None:
    (piece,) = cut([(SIZE - 8, 0, 8), (SIZE, 8, 8)], ours(HOST, HOST), theirs(HOST))
    np.testing.assert_array_equal(piece.length, [8, 8])
    assert len(piece.regions) == 2


def test_ranges_outside_are_named() -> None:
    good: Vector = np.array([HERE, HERE + 8], np.int64)
    with pytest.raises(Outside) as error:
        pieces(good - (0, 1 << 39), good, np.array([8, 8]), ours(HOST), theirs(HOST))
    assert error.value.index == 1


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(1, 9)), min_size=1))
def test_every_byte_is_moved_once_and_in_its_place(rows: list[tuple[int, int, int]]) -> None:
    wanted = [(a + i, b + i) for a, b, n in rows for i in range(n)]
    assert as_bytes(cut(rows, ours(HOST), theirs(HOST))) == wanted

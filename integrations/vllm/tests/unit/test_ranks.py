"""Which ranks and parts a rank reads: all heads exactly once, for every pair of splits."""

from __future__ import annotations

import pytest
from datadist_vllm.ranks import Split, pieces_of, readers_of

HEADS = 8


def _gqa(ranks: int, parts: int = 1) -> Split:
    return Split(ranks, min(ranks, HEADS), parts)


def _read(rank: int, here: Split, there: Split) -> list[int]:
    """For each of the rank's heads, in order, the head that is read into it."""
    width, far = HEADS // here.shards, HEADS // there.shards
    heads = [-1] * width
    for piece in pieces_of(rank, here, there):
        shard = piece.rank * there.shards // there.ranks
        size = far // there.parts
        assert size == width // piece.local_split, "parts of both ends have the same size"
        for remote, local in zip(piece.remote_parts, piece.local_parts, strict=True):
            for head in range(size):
                assert heads[local * size + head] == -1
                heads[local * size + head] = shard * far + remote * size + head
    return heads


@pytest.mark.parametrize("here", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("there", [1, 2, 4, 8, 16])
def test_each_rank_reads_its_heads(here: int, there: int) -> None:
    parts = max(1, min(here, HEADS) // min(there, HEADS))
    for rank in range(here):
        width = HEADS // min(here, HEADS)
        first = rank * min(here, HEADS) // here * width
        got = _read(rank, _gqa(here), _gqa(there, parts))
        assert got == list(range(first, first + width))


def test_finer_parts_than_needed_are_read_too() -> None:
    assert _read(0, _gqa(2), _gqa(2, 4)) == [0, 1, 2, 3]
    assert _read(1, _gqa(2), _gqa(4, 2)) == [4, 5, 6, 7]
    assert _read(3, _gqa(4), _gqa(2, 4)) == [6, 7]


def test_a_prefiller_that_does_not_split_its_blocks_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match='"peer_tensor_parallel_size": 2'):
        pieces_of(0, _gqa(2), _gqa(1))


def test_shards_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="3 shards"):
        pieces_of(0, _gqa(2), Split(3, 3, 1))


@pytest.mark.parametrize(("here", "there"), [(1, 1), (2, 1), (1, 2), (2, 4), (4, 2), (16, 8)])
def test_readers_are_counted(here: int, there: int) -> None:
    reading = _gqa(there)
    parts = max(1, reading.shards // min(here, HEADS))
    own = _gqa(here, parts)
    counts = [readers_of(rank, own, reading.ranks, reading.shards) for rank in range(here)]
    pieces = [piece.rank for rank in range(there) for piece in pieces_of(rank, reading, own)]
    assert counts == [pieces.count(rank) for rank in range(here)]
    assert sum(counts) == max(there, min(here, HEADS))


def test_of_mla_each_reader_reads_one_replica() -> None:
    here, there = Split(4, 1, 1), Split(2, 1, 1)
    assert [piece.rank for rank in range(4) for piece in pieces_of(rank, here, there)] == [
        0,
        1,
        0,
        1,
    ]
    assert [readers_of(rank, there, 4, 1) for rank in range(2)] == [2, 2]
    assert [readers_of(rank, here, 2, 1) for rank in range(4)] == [1, 1, 0, 0]

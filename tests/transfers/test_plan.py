"""Planning: which bytes go where, against a model that moves one block after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datadist.transfers.plan import (
    PART,
    Segments,
    plan_blocks,
    plan_scatter,
    plan_slots,
)

BLOCK = 16
COUNT = 64
BASES = st.lists(st.integers(1, 1 << 40).map(lambda n: n * BLOCK * COUNT), min_size=1, max_size=12)


def _moved(segments: Segments) -> list[tuple[int, int, int]]:
    """What moves, cut into pieces of at most a block, in the order of local addresses."""
    pieces = []
    vectors = (memoryview(v) for v in (segments.local, segments.remote, segments.length))
    for local, remote, length in zip(*vectors, strict=True):
        for start in range(0, length, BLOCK):
            pieces.append((local + start, remote + start, min(BLOCK, length - start)))
    assert sum(piece[2] for piece in pieces) == segments.nbytes
    return sorted(pieces)


def _as(kind: str, blocks: list[int]) -> Any:
    if kind == "array":
        return np.array(blocks)
    return blocks if kind == "list" else tuple(blocks)


KINDS = st.sampled_from(["list", "tuple", "array"])


@given(
    BASES,
    st.data(),
    st.permutations(range(COUNT)),
    st.permutations(range(COUNT)),
    st.integers(1, COUNT),
    KINDS,
)
def test_every_pair_of_blocks_moves_in_every_tensor(
    bases: list[int], data: st.DataObject, mine: list[int], theirs: list[int], count: int, kind: str
) -> None:
    remote = [base + (1 << 50) for base in bases]
    start = data.draw(st.integers(0, COUNT - count))
    if data.draw(st.booleans()):  # some that are consecutive at both ends
        mine = [*range(start, start + count)]
        theirs = [*range(start, start + count)]
    here, there = mine[:count], theirs[:count]
    before = list(here)
    given_here = _as(kind, here)
    segments = plan_blocks(bases, remote, given_here, _as(kind, there), BLOCK, BLOCK, BLOCK)
    expected = [
        (base + a * BLOCK, far + b * BLOCK, BLOCK)
        for base, far in zip(bases, remote, strict=True)
        for a, b in zip(here, there, strict=True)
    ]
    assert _moved(segments) == sorted(expected)
    assert list(given_here) == before


@pytest.mark.parametrize("runs", [0, 1, 5, 100])
@pytest.mark.parametrize("both", [True, False])
def test_blocks_that_follow_each_other_are_merged_where_they_do_at_both_ends(
    runs: int, both: bool
) -> None:
    """``runs`` of two blocks among 400 that follow nothing."""
    mine, theirs = [*range(0, 2000, 5)], [*range(4000, 0, -10)]
    for number in range(runs):
        mine[4 * number + 1] = mine[4 * number] + 1
        if both:
            theirs[4 * number + 1] = theirs[4 * number] + 1
    remote = 1 << 50
    segments = plan_blocks([0], [remote], mine, theirs, BLOCK, BLOCK, BLOCK)
    assert len(segments) == len(mine) - (runs if both else 0)
    assert _moved(segments) == [
        (a * BLOCK, remote + b * BLOCK, BLOCK) for a, b in zip(mine, theirs, strict=True)
    ]


@pytest.mark.parametrize("place", [PART - 2, PART - 1, PART, PART + 1, 3 * PART])
@pytest.mark.parametrize("few", [True, False])
def test_blocks_of_a_long_list_are_merged_wherever_they_are(place: int, few: bool) -> None:
    """Two of them follow each other at ``place``; at the other end all of them do, or only these."""
    count = 3 * PART + 2
    mine, theirs = [*range(0, 2 * count, 2)], [*range(0, 2 * count, 2)]
    mine[place + 1] = mine[place] + 1
    theirs = (
        [*theirs[: place + 1], theirs[place] + 1, *theirs[place + 2 :]] if few else [*range(count)]
    )
    for here, there in ((mine, theirs), (theirs, mine)):
        segments = plan_blocks([0], [1 << 50], here, there, BLOCK, BLOCK, BLOCK)
        assert np.flatnonzero(np.asarray(segments.length) != BLOCK).tolist() == [place]
        assert segments.length[place] == 2 * BLOCK
        assert len(segments) == count - 1


@given(
    BASES, st.permutations(range(COUNT)), st.integers(1, COUNT), st.integers(0, BLOCK - 1), KINDS
)
def test_a_slot_is_spread_over_blocks_in_order(
    bases: list[int], blocks: list[int], count: int, short: int, kind: str
) -> None:
    remote = [base + (1 << 50) for base in bases]
    total = count * BLOCK - short
    segments = plan_scatter(bases, remote, _as(kind, blocks[:count]), BLOCK, BLOCK, 8, total)
    expected = [
        (base + block * BLOCK, far + 8 + place * BLOCK, min(BLOCK, total - place * BLOCK))
        for base, far in zip(bases, remote, strict=True)
        for place, block in enumerate(blocks[:count])
    ]
    assert _moved(segments) == sorted(expected)


@given(
    BASES,
    st.sampled_from([list, tuple, np.array]),
    st.integers(0, 1 << 20),
    st.integers(0, 1 << 20),
    st.integers(1, 1 << 40),
)
def test_a_slot_moves_in_every_tensor(
    bases: list[int], kind: Callable[[list[int]], Any], local: int, remote: int, size: int
) -> None:
    mine, theirs = kind(bases), kind([base + (1 << 50) for base in bases])
    segments = plan_slots(mine, theirs, local, remote, size)
    vectors = (memoryview(v) for v in (segments.local, segments.remote, segments.length))
    assert list(zip(*vectors, strict=True)) == [
        (base + local, base + (1 << 50) + remote, size) for base in bases
    ]
    assert segments.nbytes == size * len(bases)
    assert list(mine) == bases


@pytest.mark.parametrize("tensors", [2, 3, 9])
def test_tensors_that_differ_in_number_are_refused(tensors: int) -> None:
    with pytest.raises(ValueError, match=f"{tensors} local and 10 remote tensors"):
        plan_slots([BLOCK] * tensors, [BLOCK] * 10, 0, 0, 1)


@pytest.mark.parametrize("count", [1, 8, 9, 40])
def test_blocks_that_fill_a_slot_exactly(count: int) -> None:
    fits = plan_scatter([BLOCK], [1 << 50], list(range(count)), BLOCK, BLOCK, 0, count * BLOCK)
    assert sum(memoryview(fits.length)) == fits.nbytes == count * BLOCK
    more = list(range(count + 1))
    with pytest.raises(ValueError, match=f"list at most {count}$"):
        plan_scatter([BLOCK], [1 << 50], more, BLOCK, BLOCK, 0, count * BLOCK)
    one_byte = plan_scatter([BLOCK], [1 << 50], more, BLOCK, BLOCK, 0, count * BLOCK + 1)
    assert one_byte.nbytes == count * BLOCK + 1

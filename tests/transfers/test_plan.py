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
    SET_BLOCKS,
    Segments,
    check_blocks,
    check_distinct,
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


@given(st.lists(st.integers(0, COUNT - 1), max_size=3 * COUNT), KINDS)
def test_blocks_in_range_pass_unchanged(blocks: list[int], kind: str) -> None:
    if kind == "array" and not blocks:
        return
    assert list(check_blocks("x", _as(kind, blocks), COUNT)) == blocks


BAD: list[tuple[Any, type[Exception], str]] = [
    (-1, TypeError, r"x\[{}\] is -1, only support unsigned integers"),
    (COUNT, ValueError, r"x\[{}\] is 64: the cache has 64 blocks, 0 to 63"),
    (1 << 63, ValueError, r"x\[{}\] is 9223372036854775808: "),
    (1 << 70, ValueError, r"x\[{}\] is 1180591620717411303424: "),
    (-(1 << 70), TypeError, r"x\[{}\] is -1180591620717411303424, only"),
    (1.0, TypeError, "x must hold only integers"),
    ("1", TypeError, "x must hold only integers"),
    (None, TypeError, "x must hold only integers"),
]


@pytest.mark.parametrize("length", [3, 40])
@pytest.mark.parametrize(("bad", "error", "text"), BAD)
def test_the_first_bad_block_is_named(
    bad: Any, error: type[Exception], text: str, length: int
) -> None:
    blocks: list[Any] = list(range(length))
    blocks[2] = bad
    with pytest.raises(error, match=text.format(2)):
        check_blocks("x", blocks, COUNT)
    with pytest.raises(error, match=text.format(2)):
        check_blocks("x", tuple(blocks), COUNT)


# -- destinations ---------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 400), max_size=300, unique=True),
    st.sampled_from(["sorted", "as drawn", "far apart"]),
    st.data(),
    st.sampled_from(["list", "tuple", "array", "small", "scalars"]),
)
def test_a_block_that_is_listed_twice_is_named_with_both_places(
    blocks: list[int], order: str, data: st.DataObject, kind: str
) -> None:
    if order == "sorted":
        blocks.sort()
    elif order == "far apart":
        blocks = [block << 40 for block in blocks]

    def given_as(values: list[int]) -> Any:
        if kind == "small" and order != "far apart":
            return np.array(values, np.int16)
        return list(np.array(values, int)) if kind == "scalars" else _as(kind, values)

    count = data.draw(st.sampled_from([None, 401])) if order != "far apart" else None
    check_distinct("x", given_as(blocks), count)
    if not blocks:
        return
    first = data.draw(st.integers(0, len(blocks) - 1))
    second = data.draw(st.integers(first + 1, len(blocks)))
    blocks.insert(second, blocks[first])
    text = rf"x\[{second}\] is {blocks[first]}, and so is x\[{first}\]: list each destination"
    with pytest.raises(ValueError, match=text):
        check_distinct("x", given_as(blocks), count)


@pytest.mark.parametrize("count", [None, 1 << 20])
@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize("place", [0, 1, SET_BLOCKS - 2, SET_BLOCKS - 1, SET_BLOCKS, 198, 199])
def test_neighbours_that_are_equal_in_a_long_list_are_found(
    place: int, step: int, count: int | None
) -> None:
    blocks = [step * block for block in range(200)]
    for good in (blocks, blocks[::-1]):
        check_distinct("x", good, count)
        repeated = [*good[: place + 1], *good[place:]]
        text = rf"x\[{place + 1}\] is {good[place]}, and so is x\[{place}\]"
        with pytest.raises(ValueError, match=text):
            check_distinct("x", repeated, count)


@pytest.mark.parametrize("value", [1 << 63, (1 << 64) - 1, 1 << 70, -1, -(1 << 70)])
def test_numbers_that_are_no_block_may_repeat_nowhere_either(value: int) -> None:
    for length in (1, 100):
        good = [value, *range(length)]
        check_distinct("x", good)
        with pytest.raises(ValueError, match=rf"x\[{length + 1}\] is {value}, and so is x\[0\]"):
            check_distinct("x", [*good, value])


@pytest.mark.parametrize("length", [2, 40])
@pytest.mark.parametrize("wrong", [True, False, np.True_])
@pytest.mark.parametrize("kind", [list, tuple])
def test_truth_values_are_no_blocks(length: int, wrong: Any, kind: Any) -> None:
    for place in (0, length - 1):
        blocks: list[Any] = [0, 1, *range(2, length)]
        check_blocks("x", kind(blocks), COUNT)
        blocks[place] = wrong
        with pytest.raises(TypeError, match=r"x"):
            check_blocks("x", kind(blocks), COUNT)
    with pytest.raises(TypeError, match="x must be a flat array of integers"):
        check_blocks("x", np.ones(length, bool), COUNT)

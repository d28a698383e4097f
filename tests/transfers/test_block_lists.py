"""Lists of blocks: what passes, and the first that is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datadist.transfers.block_lists import SET_BLOCKS, check_blocks, check_distinct

COUNT = 64


def _as(kind: str, blocks: list[int]) -> Any:
    if kind == "array":
        return np.array(blocks)
    return blocks if kind == "list" else tuple(blocks)


KINDS = st.sampled_from(["list", "tuple", "array"])


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

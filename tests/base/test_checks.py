"""Checks of argument types and ranges."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal

import numpy as np
import pytest

from datadist import Placement
from datadist.base import checks

RANGES: list[tuple[Callable[[str, object], None], int, int]] = [
    (checks.check_uint16, 0, 2**16 - 1),
    (checks.check_uint32, 0, 2**32 - 1),
    (checks.check_uint64, 0, 2**64 - 1),
    (checks.check_int32, -(2**31), 2**31 - 1),
    (checks.check_int64, -(2**63), 2**63 - 1),
]


@pytest.mark.parametrize(("check", "low", "high"), RANGES)
def test_ranges_include_their_ends_and_nothing_more(
    check: Callable[[str, object], None], low: int, high: int
) -> None:
    for value in (low, high):
        check("x", value)
    for value in (low - 1, high + 1):
        with pytest.raises(ValueError, match=rf"x is {value}, .*\[{low}, {high}\]"):
            check("x", value)
    for wrong in (None, "1", 1.0, True, np.True_):
        with pytest.raises(TypeError, match=r"x is a .*only support int"):
            check("x", wrong)


def test_isinstance_lets_none_through() -> None:
    checks.check_isinstance("x", None, int)
    with pytest.raises(TypeError, match="x is a NoneType"):
        checks.check_isinstance("x", None, int, allow_none=False)
    with pytest.raises(TypeError, match=r"x is a float \(1.5\), only support int or str"):
        checks.check_isinstance("x", 1.5, (int, str))


@pytest.mark.parametrize("types", [int, (int, str), (list, int, tuple), (Placement, int)])
def test_a_truth_value_is_no_integer(types: checks.Types) -> None:
    checks.check_isinstance("x", 1, types)
    for wrong in (True, False):
        with pytest.raises(TypeError, match=rf"x is a bool \({wrong}\), only support"):
            checks.check_isinstance("x", wrong, types)
        with pytest.raises(TypeError, match=r"x\[1\] is a bool"):
            checks.check_sequence_of("x", [1, wrong], int)
        for one, other in ((wrong, 1), (2, wrong)):
            with pytest.raises(TypeError, match=r"x.* is a bool"):
                checks.check_dict("x", {one: other}, int, int)


def test_a_truth_value_is_one_where_that_is_asked_for() -> None:
    for types in (bool, (int, bool), object):
        checks.check_isinstance("x", True, types)
    with pytest.raises(TypeError, match="only support bool"):
        checks.check_isinstance("x", 1, bool)


def test_elements_are_named_by_index() -> None:
    checks.check_sequence_of("x", (1, 0), int)
    with pytest.raises(TypeError, match=r"x\[1\] is a str"):
        checks.check_sequence_of("x", [1, "2"], int)
    for wrong in (None, {1}, "12"):
        with pytest.raises(TypeError, match="only support list or tuple"):
            checks.check_sequence_of("x", wrong, int)


class _Odd:
    """Adds to an integer, and is none."""

    def __radd__(self, other: int) -> float:
        return other + 0.5


class _Broken:
    """Cannot be added."""

    def __radd__(self, other: int) -> int:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "wrong",
    [
        True,
        np.True_,
        np.int64(1),
        np.zeros(2),
        1.0,
        "1",
        None,
        Decimal(1),
        1j,
        [1],
        _Odd(),
        _Broken(),
    ],
)
@pytest.mark.parametrize("place", [0, 20, 39])
def test_no_element_of_a_long_list_is_taken_for_an_integer(wrong: object, place: int) -> None:
    values: list[object] = list(range(40))
    checks.check_sequence_of("x", values, int)
    checks.check_sequence_of("x", [1, 1 << 80, -1, Placement.HOST], int)
    values[place] = wrong
    with pytest.raises(TypeError, match=rf"x\[{place}\] is a {type(wrong).__name__}"):
        checks.check_sequence_of("x", values, int)


@pytest.mark.parametrize(
    "values", [[1, Placement.HOST], (2,), [np.int64(1), 2], list(np.arange(40)), []]
)
def test_blocks_are_integers_of_python_or_numpy(values: list[object]) -> None:
    checks.check_blocks("x", values)


@pytest.mark.parametrize(
    "wrong",
    [False, np.False_, 1.0, np.float64(1), "1", None, Decimal(1), 1j, [1], _Odd(), _Broken()],
)
@pytest.mark.parametrize("place", [0, 39])
def test_blocks_are_nothing_else(wrong: object, place: int) -> None:
    values: list[object] = list(range(40))
    values[place] = wrong
    with pytest.raises(TypeError, match=rf"x\[{place}\] is a {type(wrong).__name__}"):
        checks.check_blocks("x", values)
    for refused in (None, {1}, "12"):
        with pytest.raises(TypeError, match="only support list, tuple or NumPy array of integers"):
            checks.check_blocks("x", refused)


def test_small_integers_of_numpy_are_not_added_up() -> None:
    checks.check_blocks("x", list(np.array([200, 100], np.uint8)))  # their sum would overflow


def test_a_list_of_blocks_is_no_tuple() -> None:
    for good in ([1, 2], [np.int32(1)], np.arange(2), []):
        checks.check_list_of_blocks("x", good)
    for wrong in (
        None,
        (1, 2),
        [1.5],
        [True],
        np.ones(2, bool),
        np.ones(2),
        np.ones((2, 2), int),
        "12",
    ):
        with pytest.raises(TypeError, match=r"x.*only support"):
            checks.check_list_of_blocks("x", wrong)


@pytest.mark.parametrize("large", [np.zeros(1000), np.zeros((2, 2)), list(range(1000))])
def test_a_large_value_is_not_spelled_out(large: object) -> None:
    with pytest.raises(TypeError) as caught:
        checks.check_isinstance("x", large, int)
    assert len(str(caught.value)) < 100
    assert "\n" not in str(caught.value)


def test_a_list_of_int_is_no_tuple() -> None:
    checks.check_list_of_int("x", [1, 2])
    with pytest.raises(TypeError, match="only support list"):
        checks.check_list_of_int("x", (1, 2))


def test_dicts_are_checked_in_keys_and_values() -> None:
    checks.check_dict("x", {1: 2}, int, int)
    with pytest.raises(AttributeError, match="x is None"):
        checks.check_dict("x", None, int, int)
    with pytest.raises(TypeError, match="a key of x is a str"):
        checks.check_dict("x", {"1": 2}, int, int)
    with pytest.raises(TypeError, match=r"x\[1\] is a NoneType"):
        checks.check_dict("x", {1: None}, int, int)
    with pytest.raises(TypeError, match="only support dict"):
        checks.check_dict("x", [(1, 2)], int, int)

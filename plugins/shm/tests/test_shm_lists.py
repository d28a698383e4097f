"""Lists of int as vectors of addresses, against a model in Python."""

from __future__ import annotations

import gc
import sys
import threading
from array import array
from typing import Any

import numpy as np
import pytest
from datadist_shm import ShmTransport, _native
from hypothesis import given
from hypothesis import strategies as st

from datadist.testing.list_operations import Indexed, ListCase, Whole, cases, wrong

ODD = [-1, 1 << 63, (1 << 64) - 1, 1 << 64, -(1 << 70), True, False, 1.0, None, Whole(1), Indexed()]
VALUES = st.lists(st.integers(0, 300) | st.integers(0, (1 << 63) - 1), max_size=200)
MIXED = st.lists(st.integers(0, 300) | st.sampled_from(ODD), max_size=200)


@given(
    VALUES | MIXED,
    st.integers(0, 400) | st.just((1 << 63) - 1),
    st.integers(1, 1 << 20),
    st.integers(0, 1 << 40),
    st.booleans(),
    st.sampled_from([None, None, None, 0, 5]),
)
def test_it_converts_what_is_in_order_and_refuses_the_rest(
    values: list[Any], limit: int, stride: int, base: int, distinct: bool, items: int | None
) -> None:
    if limit > 400:  # all numbers, as they are: a bit for each would be too much memory
        stride, base, distinct = 1, 0, False
    assert not wrong(
        ShmTransport.convert_list, ListCase(values, limit, stride, base, distinct, items)
    )


@given(VALUES)
def test_with_stride_1_it_writes_what_an_array_does(values: list[int]) -> None:
    vector = np.empty(len(values), np.int64)
    following = _native.convert_list(values, (1 << 63) - 1, 1, 0, vector, False)
    in_range = all(value < (1 << 63) - 1 for value in values)
    assert (following >= 0) is in_range
    if in_range:
        ours = array("Q")
        ours.fromlist(values)
        assert vector.tobytes() == ours.tobytes()


def test_the_cases_of_the_kit() -> None:
    found = list(cases())
    assert len(found) > 300
    assert [text for case in found if (text := wrong(_native.convert_list, case))] == []


def test_what_is_no_call_is_refused() -> None:
    one = array("q", [0])
    wrong_calls: list[tuple[Any, ...]] = [
        ((1,), 2, 1, 0, one, False), ([1], 2, 1, 0, one), ([1], "2", 1, 0, one, False),
        ([1], 2, 1, 0, b"12345678", False), ([1], 2, 1, 0, None, False),
    ]  # fmt: skip
    for arguments in wrong_calls:
        with pytest.raises((TypeError, BufferError)):
            _native.convert_list(*arguments)
    with pytest.raises(OverflowError):
        _native.convert_list([1], 1 << 63, 1, 0, one, False)
    for limit in (0, -1, -(1 << 63)):
        assert _native.convert_list([0], limit, 1, 0, one, True) == -1
    assert one[0] == 0


def test_memory_for_too_many_possible_numbers_is_an_error() -> None:
    with pytest.raises(MemoryError):
        _native.convert_list([1], (1 << 63) - 1, 1, 0, array("q", [0]), True)


def test_it_keeps_no_reference() -> None:
    values: list[Any] = [10**6 + n for n in range(100)]
    vector = array("q", [0]) * 100
    counts = [sys.getrefcount(each) for each in (values, vector, *values)]
    for bad in (values[99], True, 1 << 70, -1):
        values[99] = bad
        _native.convert_list(values, 1 << 20, 1, 0, vector, True)
    values[99] = 10**6 + 99
    gc.collect()
    assert [sys.getrefcount(each) for each in (values, vector, *values[:99])] == counts[:-1]
    vector.append(1)  # no buffer is held


def test_a_list_that_another_thread_changes_is_read_as_it_was_or_refused() -> None:
    values, stop = list(range(1000)), threading.Event()

    def change() -> None:
        while not stop.is_set():
            del values[500:]
            values.extend(range(500, 1000))

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(300):
            vector = np.empty(1000, np.int64)
            following = _native.convert_list(values, 1000, 1, 0, vector, True)
            assert following in (-1, 999)
            if following == 999:
                assert (vector == np.arange(1000)).all()
    finally:
        stop.set()
        thread.join()

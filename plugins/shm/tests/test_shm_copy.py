"""The native copy by itself: every kernel, every alignment, threads, overlap."""

from __future__ import annotations

import os
from array import array

import numpy as np
import pytest
from datadist_shm import _native
from hypothesis import given, settings
from hypothesis import strategies as st

MIB = 1 << 20
KERNELS = list(_native.KERNELS)


def _vector(values: list[int]) -> array[int]:
    return array("q", values)


@pytest.mark.parametrize("kernel", KERNELS)
def test_ends_of_every_alignment(kernel: str) -> None:
    rng = np.random.default_rng(1)
    source = rng.integers(0, 256, 10 * MIB, np.uint8)
    lengths = [int(n) for most in (1000, 9000, 30_000) for n in rng.integers(1, most, 100)]
    pieces = [
        (place * 32_768 + int(a), place * 32_768 + int(b), n)
        for place, (n, (a, b)) in enumerate(
            zip(lengths, rng.integers(0, 64, (300, 2)), strict=True)
        )
    ]
    target, expected = np.zeros_like(source), np.zeros_like(source)
    for to, frm, n in pieces:
        expected[to : to + n] = source[frm : frm + n]
    _native.copy(
        _vector([target.ctypes.data + to for to, _, _ in pieces]),
        _vector([source.ctypes.data + frm for _, frm, _ in pieces]),
        _vector([n for _, _, n in pieces]),
        1,
        _native.KERNELS[kernel],
    )
    assert np.array_equal(target, expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("threads", [1, 3])
def test_large_copies_by_threads(kernel: str, threads: int) -> None:
    rng = np.random.default_rng(2)
    size, count = 150_001, 200
    source = rng.integers(0, 256, size * count, np.uint8)
    target = np.zeros_like(source)
    order = rng.permutation(count)
    _native.copy(
        target.ctypes.data + np.arange(count) * size,
        source.ctypes.data + order * size,
        np.full(count, size, np.int64),
        threads,
        _native.KERNELS[kernel],
    )
    assert np.array_equal(target.reshape(count, size), source.reshape(count, size)[order])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 900), st.integers(0, 900), st.integers(1, 124)),
        min_size=1,
        max_size=12,
    )
)
def test_overlapping_copies_happen_in_order(pieces: list[tuple[int, int, int]]) -> None:
    memory = np.arange(1024, dtype=np.int64).astype(np.uint8)
    expected = memory.copy()
    for to, frm, n in pieces:
        expected[to : to + n] = expected[frm : frm + n].copy()
    base = memory.ctypes.data
    _native.copy(
        _vector([base + to for to, _, _ in pieces]),
        _vector([base + frm for _, frm, _ in pieces]),
        _vector([n for _, _, n in pieces]),
        2,
        list(_native.KERNELS.values())[-1],
    )
    assert np.array_equal(memory, expected)


def test_arguments_are_checked() -> None:
    one, two = _vector([1]), _vector([1, 2])
    for args in ((one, one, two, 1, 0), (_vector([]), _vector([]), _vector([]), 1, 0)):
        with pytest.raises(ValueError, match="equal length"):
            _native.copy(*args)
    for threads, kernel in ((0, 0), (65, 0), (1, 99), (1, -1)):
        with pytest.raises(ValueError, match="out of range"):
            _native.copy(one, one, one, threads, kernel)
    with pytest.raises(TypeError):
        _native.copy(one, one, one)  # type: ignore[call-arg]


def test_no_thread_is_left() -> None:
    source, target = np.ones(64 * MIB, np.uint8), np.zeros(64 * MIB, np.uint8)
    before = len(os.listdir("/proc/self/task"))
    for _ in range(5):
        _native.copy(
            _vector([target.ctypes.data]), _vector([source.ctypes.data]), _vector([64 * MIB]), 4, 0
        )
    assert len(os.listdir("/proc/self/task")) == before


def test_a_forked_child_can_copy_too() -> None:
    source, target = np.full(32 * MIB, 7, np.uint8), np.zeros(32 * MIB, np.uint8)
    vectors = (
        _vector([target.ctypes.data]), _vector([source.ctypes.data]), _vector([32 * MIB]),
    )  # fmt: skip
    _native.copy(*vectors, 4, 0)
    pid = os.fork()
    if pid == 0:
        target[:] = 0
        _native.copy(*vectors, 4, 0)
        os._exit(0 if target.min() == 7 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

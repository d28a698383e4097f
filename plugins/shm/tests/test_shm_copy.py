"""The native copy by itself: every kernel, every alignment, threads, overlap."""

from __future__ import annotations

import os
import re
import threading
from array import array
from pathlib import Path

import numpy as np
import pytest
from datadist_shm import _native
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tasks
from tests.nodes import Here

MIB = 1 << 20
KERNELS = list(_native.KERNELS)


def _vector(values: list[int]) -> array[int]:
    return array("q", values)


def test_the_kernels_are_those_that_this_processor_has_instructions_for() -> None:
    flags = set(re.findall(r"^flags\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.M)[:1])
    known = {"rep_movsb": "erms", "avx2": "avx2", "avx512": "avx512f"}
    if not flags:
        pytest.skip("this machine has no x86-64 processor")
    has = set(flags.pop().split())
    if "sse2" not in KERNELS:
        assert KERNELS == ["memcpy"], "a portable build has no kernels of a processor"
        return
    assert {name for name in known if name in KERNELS} == {
        name for name, flag in known.items() if flag in has
    }


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
def test_every_small_size_and_what_is_beside_it(kernel: str) -> None:
    """All sizes up to 1024, at random places: nothing beside the target changes.

    Three times, since kernels are for a MiB or more in all.
    """
    rng = np.random.default_rng(7)
    room, most, times = 2048, 1024, 3
    source = rng.integers(0, 256, (times * most, room), np.uint8)
    target = rng.integers(0, 256, (times * most, room), np.uint8)
    expected = target.copy()
    sizes = np.tile(np.arange(1, most + 1), times)
    places = rng.integers(0, room - most, (times * most, 2))
    for n, ((to, frm), size) in enumerate(zip(places, sizes, strict=True)):
        expected[n, to : to + size] = source[n, frm : frm + size]
    rows = np.arange(times * most) * room
    _native.copy(
        target.ctypes.data + rows + places[:, 0],
        source.ctypes.data + rows + places[:, 1],
        sizes,
        1,
        _native.KERNELS[kernel],
    )
    assert np.array_equal(target, expected)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=25)
@given(data=st.data())
def test_random_sizes_and_ends(kernel: str, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 2 * MIB))
    to, frm = data.draw(st.integers(0, 4096)), data.draw(st.integers(0, 4096))
    rng = np.random.default_rng(size)
    room, large = size + 8192, MIB  # the second piece: kernels are for a MiB or more in all
    source, target = (rng.integers(0, 256, room + large, np.uint8) for _ in range(2))
    expected = target.copy()
    expected[to : to + size] = source[frm : frm + size]
    expected[room:] = source[room:]
    _native.copy(
        _vector([target.ctypes.data + to, target.ctypes.data + room]),
        _vector([source.ctypes.data + frm, source.ctypes.data + room]),
        _vector([size, large]),
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


@settings(max_examples=60)
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
        _native.AUTO,
    )
    assert np.array_equal(memory, expected)


SHIFTS = [1, 63, 64, 4095, 4096, MIB + 7]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shift", [*SHIFTS, *(-n for n in SHIFTS)])
def test_large_overlapping_ranges_are_copied_in_the_right_direction(
    kernel: str, shift: int
) -> None:
    memory = np.random.default_rng(4).integers(0, 256, 12 * MIB, np.uint8)
    begin, size = 2 * MIB, 8 * MIB  # enough for several threads and for stores past the cache
    expected = memory.copy()
    expected[begin + shift : begin + shift + size] = memory[begin : begin + size]
    base = memory.ctypes.data + begin
    _native.copy(
        _vector([base + shift]), _vector([base]), _vector([size]), 4, _native.KERNELS[kernel]
    )
    assert np.array_equal(memory, expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shared", [0, 1, 64])
@pytest.mark.parametrize("side", [1, -1])
def test_large_ranges_that_share_their_ends(kernel: str, shared: int, side: int) -> None:
    size = 8 * MIB
    memory = np.random.default_rng(6).integers(0, 256, 3 * size, np.uint8)
    begin, to = size, size + side * (size - shared)
    expected = memory[begin : begin + size].copy()
    base = memory.ctypes.data
    _native.copy(
        _vector([base + to]), _vector([base + begin]), _vector([size]), 4, _native.KERNELS[kernel]
    )
    assert np.array_equal(memory[to : to + size], expected)


@pytest.mark.parametrize("order", [1, -1])
def test_large_pieces_that_depend_on_each_other_are_copied_in_order(order: int) -> None:
    size, count = 3 * MIB + 5, 6
    memory = np.random.default_rng(5).integers(0, 256, (count, size), np.uint8)
    expected = memory.copy()
    pairs = [(n, n + 1) for n in range(count - 1)][::order]
    for source, target in pairs:
        expected[target] = expected[source]
    _native.copy(
        memory.ctypes.data + np.array([target for _, target in pairs]) * size,
        memory.ctypes.data + np.array([source for source, _ in pairs]) * size,
        np.full(len(pairs), size, np.int64),
        4,
        _native.AUTO,
    )
    assert np.array_equal(memory, expected)


def test_arguments_are_checked() -> None:
    one, two = _vector([1]), _vector([1, 2])
    for args in ((one, one, two, 1, 0), (_vector([]), _vector([]), _vector([]), 1, 0)):
        with pytest.raises(ValueError, match="equal length"):
            _native.copy(*args)
    for threads, kernel in ((0, 0), (65, 0), (-65, 0), (1, 99), (1, -1)):
        with pytest.raises(ValueError, match="out of range"):
            _native.copy(one, one, one, threads, kernel)
    with pytest.raises(TypeError):
        _native.copy(one, one, one)  # type: ignore[call-arg]


# -- threads: in processes of their own, where helpers start however busy the machine is --------


class _Large:
    """A target of zeros, and a source of 7; held together, since vectors hold no memory."""

    def __init__(self) -> None:
        self.source = np.full(32 * MIB, 7, np.uint8)
        self.target = np.zeros(32 * MIB, np.uint8)

    def copy(self) -> None:
        to, frm, size = (
            _vector([n]) for n in (self.target.ctypes.data, self.source.ctypes.data, 32 * MIB)
        )
        _native.copy(to, frm, size, 4, 0)


def _mappings() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def _has_thread_sanitizer() -> bool:
    return "libtsan" in Path("/proc/self/maps").read_text()


def _helpers_come_and_go(_here: Here) -> None:
    large, seen, counted = _Large(), threading.Event(), threading.Event()
    with tasks.meanwhile(counted.wait):  # a thread sanitizer starts one of its own with the first
        before = tasks.count()
        counted.set()

    def watch() -> None:
        if tasks.rises_to(before + 3):
            seen.set()
        over.set()

    over = threading.Event()
    with tasks.meanwhile(watch):
        while not over.is_set():
            large.target[:] = 0
            large.copy()
            assert large.target.min() == 7
    assert seen.is_set(), "three helpers and the caller"
    assert tasks.falls_to(before - 1), "helpers outlive their copies"
    mapped = _mappings()
    for _ in range(30):
        large.copy()
    if not _has_thread_sanitizer():  # which maps memory for each thread that it has seen
        assert _mappings() < mapped + 20, "stacks of helpers that were not joined"


def test_helpers_run_and_none_is_left() -> None:
    tasks.with_helpers(_helpers_come_and_go)


def _copy_in_a_forked_child(_here: Here) -> None:
    large = _Large()
    large.copy()
    pid = os.fork()
    if pid == 0:
        large.target[:] = 0
        large.copy()
        os._exit(0 if large.target.min() == 7 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_forked_child_can_copy_too() -> None:
    tasks.with_helpers(_copy_in_a_forked_child)

"""Planning: which bytes go where, as three int64 vectors for one native call.

Pure functions. The caller has checked ids, kinds, bounds and block lists (`block_lists.py`). A request
costs time by its tensors plus blocks: block lists become int64 arrays, runs that are consecutive on
both sides are merged, and offsets are broadcast over the tensors. Requests of a few segments take plain
Python instead, which beats the fixed cost of the array operations.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from datadist.transfers import int_lists
from datadist.transfers.block_lists import FEW, Blocks, as_sequence, as_vector
from datadist.transfers.int_lists import Int64Array

__all__ = [
    "Bases",
    "Segments",
    "joined",
    "plan_blocks",
    "plan_lists",
    "plan_scatter",
    "plan_slots",
]

Bases: TypeAlias = Sequence[int] | Int64Array
"""Base address per tensor."""
Vector: TypeAlias = "array[int] | Int64Array"
"""What holds segments: both are buffers of int64."""

SCALAR_SEGMENTS = FEW
"""Up to so many segments plain Python plans faster than NumPy."""
FEW_JOINS = 16
"""If fewer than one block of so many follows the one before, the other side is looked at only there."""
PART = 1 << 14
"""So many numbers are compared at a time: that needs no new pages, and what the cache holds."""


class Segments:
    """What to move: equal int64 buffers of local addresses, remote addresses and bytes.

    The buffers are C-contiguous and hold at least one item when the request names anything.
    ``nbytes`` is the sum of the lengths. ``len()`` is the number of segments.
    """

    __slots__ = ("length", "local", "nbytes", "remote")

    def __init__(self, local: Vector, remote: Vector, length: Vector, nbytes: int) -> None:
        self.local = local
        self.remote = remote
        self.length = length
        self.nbytes = nbytes

    def __len__(self) -> int:
        return len(self.length)

    def __repr__(self) -> str:
        return f"Segments({len(self)} segments, {self.nbytes} bytes)"


def plan_slots(
    local_bases: Bases, remote_bases: Bases, local_offset: int, remote_offset: int, size: int
) -> Segments:
    """Move ``size`` bytes at an offset in every tensor: contiguous cache to contiguous cache.

    Offsets are bytes from the base of each tensor. One segment per tensor.
    """
    tensors = _tensors(local_bases, remote_bases)
    if tensors <= SCALAR_SEGMENTS:
        return Segments(
            array("q", [base + local_offset for base in as_sequence(local_bases)]),
            array("q", [base + remote_offset for base in as_sequence(remote_bases)]),
            array("q", [size] * tensors),
            size * tensors,
        )
    return Segments(
        as_vector(local_bases) + local_offset,
        as_vector(remote_bases) + remote_offset,
        _filled(tensors, size),
        size * tensors,
    )


def plan_blocks(
    local_bases: Bases,
    remote_bases: Bases,
    local_blocks: Blocks,
    remote_blocks: Blocks,
    local_stride: int,
    remote_stride: int,
    block_bytes: int,
) -> Segments:
    """Pair ``remote_blocks[i]`` with ``local_blocks[i]`` in every tensor, ``block_bytes`` each.

    Strides are bytes from one block to the next. Pairs that are consecutive on both sides become
    one segment where blocks are dense on both sides (both strides equal ``block_bytes``).

    Raises :class:`ValueError` when the lists differ in length.
    """
    tensors, count = _tensors(local_bases, remote_bases), len(local_blocks)
    if len(remote_blocks) != count:
        raise ValueError(
            f"block lists differ in length: {count} local and {len(remote_blocks)} remote blocks"
        )
    dense = local_stride == remote_stride == block_bytes
    total = tensors * count * block_bytes
    if tensors * count <= SCALAR_SEGMENTS:
        runs = _runs(as_sequence(local_blocks), as_sequence(remote_blocks), dense)
        local = [first * local_stride for first, _, _ in runs]
        remote = [first * remote_stride for _, first, _ in runs]
        length = [n * block_bytes for _, _, n in runs]
        return _spread_scalar(local_bases, remote_bases, local, remote, length, total)
    mine, theirs = as_vector(local_blocks), as_vector(remote_blocks)
    if not dense:
        lengths = _filled(count, block_bytes)
    else:
        mine, theirs, lengths = _merge(mine, theirs, block_bytes)
    return _spread(
        local_bases, remote_bases, mine * local_stride, theirs * remote_stride, lengths, total
    )


def plan_lists(
    local_bases: Bases,
    remote_bases: Bases,
    local_blocks: object,
    remote_blocks: object,
    local_stride: int,
    remote_stride: int,
    block_bytes: int,
    local_count: int,
    remote_count: int,
    write: bool,
) -> Segments | None:
    """:func:`plan_blocks` with the checks of both lists, in a single pass over each.

    The caches have ``local_count`` and ``remote_count`` blocks, those of the destination (``write`` says
    which) are to be distinct. None for lists that are not in order or short, for what is no list, and
    where no native code is there: the caller plans, and checks, in the other way.
    """
    one = len(local_bases) == 1  # then the vectors become the result
    mine = int_lists.addresses(
        local_blocks, local_count, local_stride, int(local_bases[0]) if one else 0, not write
    )
    theirs = mine and int_lists.addresses(
        remote_blocks, remote_count, remote_stride, int(remote_bases[0]) if one else 0, write
    )
    if not mine or not theirs:
        return None
    (local, following), (remote, following_too) = mine, theirs
    count = len(local)
    if len(remote) != count:
        return None
    if following and following_too and local_stride == remote_stride == block_bytes:
        local, remote, lengths = _merge(local, remote, block_bytes, block_bytes)
    else:
        lengths = _filled(count, block_bytes)
    total = len(local_bases) * count * block_bytes
    if one:
        return Segments(local, remote, lengths, total)
    return _spread(local_bases, remote_bases, local, remote, lengths, total)


def plan_scatter(
    local_bases: Bases,
    remote_bases: Bases,
    local_blocks: Blocks,
    local_stride: int,
    block_bytes: int,
    remote_offset: int,
    total: int,
) -> Segments:
    """Spread a contiguous slot over blocks: block i gets bytes ``[i*b, (i+1)*b)`` of the slot.

    ``b`` is ``block_bytes``; blocks begin ``local_stride`` bytes apart. The slot begins
    ``remote_offset`` bytes into each remote tensor and holds ``total`` bytes, so the last listed block
    may get less than ``b``. Bytes beyond the listed blocks stay behind. Consecutive local blocks
    become one segment where they are dense.

    Raises :class:`ValueError` when some block would get nothing.
    """
    tensors, count = _tensors(local_bases, remote_bases), len(local_blocks)
    if (count - 1) * block_bytes >= total:
        raise ValueError(
            f"{count} blocks of {block_bytes} bytes are more than {total} bytes fill: "
            f"list at most {-(-total // block_bytes)}"
        )
    segments = plan_blocks(
        local_bases,
        _shifted(remote_bases, remote_offset),
        local_blocks,
        range(count),
        local_stride,
        block_bytes,
        block_bytes,
    )
    short = max(0, count * block_bytes - total)
    if short:
        each = len(segments) // tensors
        np.frombuffer(segments.length, np.int64)[each - 1 :: each] -= short
        segments.nbytes -= tensors * short
    return segments


def joined(parts: Sequence[Segments]) -> Segments:
    """The segments of several plans as one."""
    if len(parts) == 1:
        return parts[0]
    local, remote, length = (
        np.concatenate([np.asarray(getattr(part, name), np.int64) for part in parts])
        for name in ("local", "remote", "length")
    )
    return Segments(local, remote, length, sum(part.nbytes for part in parts))


def _tensors(local_bases: Bases, remote_bases: Bases) -> int:
    tensors = len(local_bases)
    if len(remote_bases) != tensors:
        raise ValueError(
            f"tensor counts differ: {tensors} local and {len(remote_bases)} remote tensors"
        )
    return tensors


def _shifted(bases: Bases, offset: int) -> Bases:
    if isinstance(bases, np.ndarray):
        return bases + offset
    return [base + offset for base in bases]


def _filled(count: int, value: int) -> Int64Array:
    vector = np.empty(count, np.int64)  # np.full takes twice as long for few
    vector.fill(value)
    return vector


def _runs(mine: Sequence[int], theirs: Sequence[int], dense: bool) -> list[tuple[int, int, int]]:
    """(first local, first remote, count) of every run; single blocks where not ``dense``."""
    runs: list[tuple[int, int, int]] = []
    for here, there in zip(mine, theirs, strict=True):
        if dense and runs:
            a, b, n = runs[-1]
            if here == a + n and there == b + n:
                runs[-1] = (a, b, n + 1)
                continue
        runs.append((here, there, 1))
    return runs


def _follow(blocks: Int64Array, stride: int) -> NDArray[np.bool_]:
    """Whether each block but the first one is the next after the one before it: ``stride`` further."""
    found = np.empty(len(blocks) - 1, np.bool_)
    steps = np.empty(min(PART, len(found)), np.int64)
    for at in range(0, len(found), PART):
        part = blocks[at : at + PART + 1]
        step = np.subtract(part[1:], part[:-1], out=steps[: len(part) - 1])
        np.equal(step, stride, out=found[at : at + PART])
    return found


def _merge(
    mine: Int64Array, theirs: Int64Array, block_bytes: int, stride: int = 1
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """First local block, first remote block and bytes of every run.

    ``stride`` is from one block to the next: 1, or the bytes where blocks are given by addresses.
    """
    count = len(mine)
    joins = _follow(mine, stride)
    if np.count_nonzero(joins) <= count // FEW_JOINS:  # look only at those
        (places,) = joins.nonzero()
        if len(places):
            joins[places] = theirs[places + 1] - theirs[places] == stride
    else:
        joins &= _follow(theirs, stride)
    if not joins.any():
        return mine, theirs, _filled(count, block_bytes)
    (inner,) = np.logical_not(joins, out=joins).nonzero()
    bounds = np.empty(len(inner) + 2, np.int64)
    bounds[0], bounds[-1] = 0, count
    np.add(inner, 1, out=bounds[1:-1])
    starts = bounds[:-1]
    return mine[starts], theirs[starts], np.diff(bounds) * block_bytes


def _spread_scalar(
    local_bases: Bases,
    remote_bases: Bases,
    local: list[int],
    remote: list[int],
    length: list[int],
    nbytes: int,
) -> Segments:
    """The same runs in every tensor, by plain Python."""
    return Segments(
        array("q", [base + offset for base in as_sequence(local_bases) for offset in local]),
        array("q", [base + offset for base in as_sequence(remote_bases) for offset in remote]),
        array("q", length * len(local_bases)),
        nbytes,
    )


def _spread(
    local_bases: Bases,
    remote_bases: Bases,
    local: Int64Array,
    remote: Int64Array,
    length: Int64Array,
    nbytes: int,
) -> Segments:
    """The same runs in every tensor, broadcast. With a single one the vectors become the result.

    New memory costs more than the sums: the kernel makes and clears its pages.
    """
    if len(local_bases) == 1:
        local += local_bases[0]
        remote += remote_bases[0]
        return Segments(local, remote, length, nbytes)
    mine, theirs = as_vector(local_bases), as_vector(remote_bases)
    lengths = np.empty((len(mine), len(length)), np.int64)
    lengths[:] = length
    return Segments(
        np.add.outer(mine, local).ravel(),
        np.add.outer(theirs, remote).ravel(),
        lengths.ravel(),
        nbytes,
    )

"""Lists of blocks as users give them: checked, and in the form that planning takes fastest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index as as_index
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from datadist.base.callers import pass_on
from datadist.base.checks import is_index
from datadist.transfers import int_lists
from datadist.transfers.int_lists import Int64Array

__all__ = [
    "FEW",
    "Blocks",
    "as_sequence",
    "as_vector",
    "check_blocks",
    "check_destinations",
    "check_distinct",
    "check_named_distinct",
]

Blocks: TypeAlias = Sequence[int] | NDArray[np.integer]
"""Block indices: a list, tuple or range of int, or a NumPy array of integers."""

FEW = 8
"""Up to so many plain Python is faster than NumPy (measured: 4 us each at 8 to 16)."""
SET_BLOCKS = 64
"""Up to so many blocks a set finds repeated ones faster than NumPy."""
SPARSE = 16
"""From so many possible numbers per block on, sorting the blocks beats a mark for each number."""


def check_blocks(name: str, blocks: Blocks, count: int, holder: str = "the cache") -> Blocks:
    """``blocks`` in the form that the planning functions take fastest, all in ``[0, count)``.

    Raises :class:`ValueError` naming the first bad index, its position and the limit (``name``
    begins the text), :class:`TypeError` for a negative one (LLM-DataDist API, pull_blocks) and for
    something that is not a flat list of integers. ``holder`` has the ``count`` blocks, for people.
    """
    if isinstance(blocks, np.ndarray) and (blocks.dtype.kind not in "iu" or blocks.ndim != 1):
        raise TypeError(
            f"{name} must be a flat array of integers, not {blocks.dtype} of shape {blocks.shape}"
        )
    if len(blocks) <= FEW:
        plain = _plain_checked(name, blocks)
        if plain and (min(plain) < 0 or max(plain) >= count):
            raise _out_of_range(name, plain, count, holder)
        return plain
    known = int_lists.checked(blocks, count)
    if known is not None:
        return known
    try:
        # As unsigned numbers negative ones are huge, so that one pass finds both kinds.
        vector = as_vector(blocks)
        wrapped = isinstance(blocks, np.ndarray) and blocks.dtype == np.uint64
        unsigned = blocks if wrapped else vector.view(np.uint64)
        bad = int(np.maximum.reduce(unsigned)) >= count
        _refuse_bool(name, blocks, vector)
    except OverflowError as error:
        pass_on(error)
        bad = True
    except TypeError as error:
        pass_on(error)
        raise TypeError(f"{name} must hold only integers: {error}") from None
    if bad:
        raise _out_of_range(name, blocks, count, holder)
    return vector


def _refuse_bool(name: str, blocks: Blocks, vector: Int64Array) -> None:
    """Only what became 0 or 1 can have been a truth value: looking at every type would take longer."""
    if isinstance(blocks, (np.ndarray, range)):
        return
    for place in (vector < 2).nonzero()[0].tolist():
        if isinstance(blocks[place], bool):
            raise TypeError(f"{name}[{place}] is {blocks[place]}, which is no block index")


def check_distinct(name: str, blocks: Blocks, count: int | None = None) -> None:
    """Raise :class:`ValueError` for a block that is listed twice, naming it and both places.

    For lists of destinations: which of two sources such a block would get is not defined. ``count``
    says that all blocks are known to be in ``[0, count)``.
    """
    if not _distinct(blocks, count):
        raise _repeated(blocks, (f"{name}[{place}]" for place in range(len(blocks))))


def check_destinations(name: str, blocks: Blocks, count: int, holder: str = "the cache") -> Blocks:
    """:func:`check_blocks` and :func:`check_distinct`, in a single pass over a list where possible."""
    if len(blocks) > FEW:
        known = int_lists.checked(blocks, count, distinct=True)
        if known is not None:
            return known
    checked = check_blocks(name, blocks, count, holder)
    check_distinct(name, checked, count)
    return checked


def check_named_distinct(blocks: Blocks, names: Iterable[str]) -> None:
    """:func:`check_distinct` where each block has a name of its own in the text."""
    if not _distinct(blocks, None):
        raise _repeated(blocks, names)


def _repeated(blocks: Blocks, names: Iterable[str]) -> ValueError:
    seen: dict[int, str] = {}
    for block, name in zip(map(as_index, blocks), names, strict=True):
        if block in seen:
            return ValueError(
                f"{name} is {block}, and so is {seen[block]}: list each destination block once"
            )
        seen[block] = name
    raise AssertionError("no block is listed twice")


def _distinct(blocks: Blocks, count: int | None) -> bool:
    number = len(blocks)
    if number <= SET_BLOCKS:
        return len(set(as_sequence(blocks))) == number
    try:
        vector = as_vector(blocks)
    except (OverflowError, TypeError) as error:  # out of any cache's range, which the caller finds
        pass_on(error)
        return len(set(blocks)) == number
    if _ascends(vector[:SET_BLOCKS]) and _ascends(vector):
        return True
    if count is None or count > SPARSE * number:
        low = int(vector.min())
        count = int(vector.max()) - low + 1
        if count > SPARSE * number:
            vector = np.sort(vector)
            return not np.equal(vector[1:], vector[:-1]).any()
        vector = vector - low
    seen = np.zeros(count, np.bool_)
    seen[vector] = True
    return int(np.count_nonzero(seen)) == number


def _ascends(vector: Int64Array) -> bool:
    return bool(np.greater(vector[1:], vector[:-1]).all())


def _out_of_range(name: str, blocks: Blocks, count: int, holder: str) -> Exception:
    numbers = map(as_index, blocks)
    place, block = next((i, b) for i, b in enumerate(numbers) if not 0 <= b < count)
    if block < 0:
        return TypeError(f"{name}[{place}] is {int(block)}, only support unsigned integers")
    limit = f"{holder} has {count} blocks, 0 to {count - 1}" if count else f"{holder} has no blocks"
    return ValueError(f"{name}[{place}] is {int(block)}: {limit}")


def _plain_checked(name: str, blocks: Blocks) -> list[int]:
    plain = as_sequence(blocks)
    if set(map(type, plain)) <= {int}:
        return list(plain)
    for place, block in enumerate(plain):
        if not is_index(block):
            raise TypeError(
                f"{name} must hold only integers: {name}[{place}] is a {type(block).__name__}"
            )
    return [as_index(block) for block in plain]


def as_sequence(values: Blocks) -> Sequence[int]:
    """As what plain Python goes through fastest."""
    if isinstance(values, np.ndarray):
        return cast("list[int]", values.tolist())
    return values


def as_vector(values: Blocks) -> Int64Array:
    """As a vector; raises as :func:`~datadist.transfers.int_lists.by_python`."""
    if isinstance(values, np.ndarray):
        return np.ascontiguousarray(values, np.int64)
    if isinstance(values, range):
        return np.arange(values.start, values.stop, values.step, dtype=np.int64)
    return int_lists.by_python(values)

"""Seeded patterns of bytes, for comparing memory after transfers."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

BLOCK = 1_048_573
"""Period of the pattern, a prime: data that is moved by a power of two always differs."""


def pattern(seed: int, size: int) -> bytes:
    """``size`` bytes that belong to ``seed``."""
    block = random.Random(seed).randbytes(min(BLOCK, size))
    return b"".join([*[block] * (size // len(block)), block[: size % len(block)]])


@dataclass(frozen=True)
class ExpectedWrite:
    """Segments of a transfer: offsets here and in the source, whose memory was filled with ``seed``."""

    seed: int
    size: int
    here: array[int]
    there: array[int]
    length: array[int]


def expected(seed: int, size: int, expected_write: Iterable[ExpectedWrite]) -> bytearray:
    """The content of memory filled with ``seed`` after these writes, including guard bytes."""
    data = bytearray(pattern(seed, size))
    for arrival in expected_write:
        source = memoryview(pattern(arrival.seed, arrival.size))
        for here, there, n in zip(arrival.here, arrival.there, arrival.length, strict=True):
            data[here : here + n] = source[there : there + n]
    return data


def difference(actual: bytes, wanted: bytes | bytearray, begin: int = 0) -> str | None:
    """Where two ranges of bytes differ, for people; None if they do not.

    ``begin`` is the offset of the ranges in their memory.
    """
    if actual == wanted:
        return None
    wrong = [i for i, (a, b) in enumerate(zip(actual, wanted, strict=True)) if a != b]
    first = wrong[0]
    return (
        f"{len(wrong)} of {len(wanted)} bytes are wrong, from offset {begin + first} to "
        f"{begin + wrong[-1]}: {actual[first : first + 8].hex()} instead of "
        f"{wanted[first : first + 8].hex()}"
    )

"""Lists of int as int64 vectors: by native code of a transport where one has it, else by Python."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from datadist.transport import MAX_SPREAD, Transport

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Int64Array", "addresses", "by_python", "checked", "use"]

Int64Array: TypeAlias = NDArray[np.int64]
Converter: TypeAlias = "Callable[[list[int], int, int, int, Buffer, bool], int]"

_converter: Converter | None = None


def use(converter: Converter) -> None:
    """Convert by a transport's :meth:`Transport.convert_list` from now on, in the whole process.

    That of the base class changes nothing. Engines of a process may have different transports: what
    one of them converts is what any other one would.
    """
    global _converter
    if converter is not Transport.convert_list:
        _converter = converter


def addresses(
    values: object, limit: int, stride: int, base: int, distinct: bool
) -> tuple[Int64Array, int] | None:
    """``base + stride * value`` for each value of a list, and how many values follow the one before.

    None where ``values`` is no list, where one is not in ``[0, limit)`` or, if ``distinct``, listed
    twice, and where no native code is there to tell: the caller finds out.
    """
    converter = _converter
    if converter is None or type(values) is not list:
        return None
    if distinct and limit > MAX_SPREAD * len(values):
        return None
    vector = np.empty(len(values), np.int64)
    following = converter(values, limit, stride, base, vector, distinct)
    return None if following < 0 else (vector, following)


def checked(values: object, limit: int, distinct: bool = False) -> Int64Array | None:
    """The values of a list; None as for :func:`addresses`."""
    found = addresses(values, limit, 1, 0, distinct)
    return None if found is None else found[0]


def by_python(values: Sequence[int]) -> Int64Array:
    """The values as a vector of their own; those from 2**63 on become negative.

    Raises :class:`OverflowError` for negative numbers and those from 2**64 on, :class:`TypeError` for
    what is no integer.
    """
    # A quarter of the time of array("q") or np.array(); refuses floats, and negative numbers.
    if type(values) is not list:
        return np.frombuffer(array("Q", values), np.int64)
    vector = array("Q")
    vector.fromlist(values)  # half the time of the constructor
    return np.frombuffer(vector, np.int64)

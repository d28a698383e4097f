"""What transports check of an offer alike: the version of its format, and ranges of addresses."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from pydantic_core import PydanticCustomError

from datadist.base.texts import short_repr

__all__ = ["check_version", "overlap"]


def check_version(version: object, needed: int, distribution: str) -> object:
    """The version of an offer, for a validator of pydantic, which reports what this raises.

    Raises ``PydanticCustomError`` unless it is ``needed``.
    """
    if version != needed:
        raise PydanticCustomError(
            "version",
            "it is {version}, this release needs {needed}: install the same release of "
            "{distribution} for all ranks",
            {"version": short_repr(version), "needed": needed, "distribution": distribution},
        )
    return version


def overlap(ranges: Sequence[tuple[int, int]]) -> int | None:
    """The first address that two of these ranges (address, size) share; None if they are apart."""
    for (begin, size), (second, _) in itertools.pairwise(sorted(ranges)):
        if begin + size > second:
            return second
    return None

"""Memory after a transfer that was interrupted: every element from before or after it, and no other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Tensors: TypeAlias = Sequence[NDArray[Any]]


def moved(old: Tensors, source: Tensors, rows: Mapping[int, int]) -> list[NDArray[Any]]:
    """What ``old`` becomes by a whole transfer; ``rows`` leads from its slots to those of the source."""
    new = [tensor.copy() for tensor in old]
    for mine, theirs in zip(new, source, strict=True):
        for to, origin in rows.items():
            mine[to] = theirs[origin]
    return new


def check_unchanged(found: Tensors, old: Tensors, whose: str) -> None:
    """Raise AssertionError for any element that is not as it was."""
    check_torn(found, old, old, whose)


def check_torn(found: Tensors, old: Tensors, new: Tensors, whose: str) -> int:
    """How many elements a transfer moved that had to stop somewhere between ``old`` and ``new``.

    All tensors are compared, every element: one that is neither from before nor from after the
    transfer is an error, and so is any that the transfer had nothing to do with.
    """
    assert len(found) == len(old) == len(new), whose
    count = 0
    for number, (is_now, was, becomes) in enumerate(zip(found, old, new, strict=True)):
        strange = (is_now != was) & (is_now != becomes)
        if strange.any():
            first = np.argwhere(strange)[0].tolist()
            raise AssertionError(
                f"{whose}, tensor {number}: {np.count_nonzero(strange)} of {strange.size} elements "
                f"are neither from before nor from after the transfer, first {first}: "
                f"{is_now[tuple(first)]}, was {was[tuple(first)]}, expected {becomes[tuple(first)]}"
            )
        count += int(np.count_nonzero(is_now != was))
    return count


def check_moved(found: Tensors, old: Tensors, new: Tensors, whose: str, whole: bool) -> int:
    """As :func:`check_torn`, or that the transfer moved everything where it is ``whole``."""
    if whole:
        check_unchanged(found, new, f"{whose}, after a success")
    return check_torn(found, old, new, whose)

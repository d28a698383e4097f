"""What the kit asks of :meth:`Transport.convert_list`; the operation runs in a process of the kit."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from datadist.base.texts import short_repr
from datadist.testing.child import State
from datadist.transports.loader import load_transport

__all__ = ["ListCase", "expected", "wrong", "wrong_conversions"]

Converter = Callable[..., int]


class Whole(int):
    """An int that is not exactly one."""


class Indexed:
    """It has `__index__`, and is no int."""

    def __index__(self) -> int:
        return 1


@dataclass(frozen=True)
class ListCase:
    """The arguments of a call, the vector's number of items in place of the vector."""

    values: list[Any]
    limit: int
    stride: int = 1
    base: int = 0
    distinct: bool = False
    items: int | None = None
    """None for as many as there are values."""


def expected(case: ListCase) -> tuple[int, list[int]] | None:
    """What the call returns and the vector holds; None where it is to refuse."""
    values = case.values
    if case.items not in (None, len(values)):
        return None
    if any(type(value) is not int or not 0 <= value < case.limit for value in values):
        return None
    if case.distinct and len(set(values)) < len(values):
        return None
    following = sum(after == value + 1 for value, after in pairwise(values))
    return following, [case.base + case.stride * value for value in values]


def wrong(convert: Converter, case: ListCase) -> str:
    """How the call differs from what is expected; empty where it does not."""
    before, wanted = list(case.values), expected(case)
    vector = array("q", [-5]) * (len(before) if case.items is None else case.items)
    got = convert(case.values, case.limit, case.stride, case.base, vector, case.distinct)
    if got == -1 and wanted is not None:
        return f"it refused {case}"
    if wanted is None and got != -1:
        return f"it returned {got} for {case}, expected -1"
    if wanted is not None and wanted != (got, list(vector)):
        return f"it returned {got} and {list(vector)} for {case}, expected {wanted}"
    if any(is_now is not was for is_now, was in zip(case.values, before, strict=True)):
        return f"it changed the list of {case}"
    return ""


def cases() -> Iterator[ListCase]:
    """Lists in order and not, short and long; the same ones each time."""
    rng = random.Random(1)
    for count in (0, 1, 2, 9, 63, 64, 65, 200, 5000):
        limit = 2 * count + 1
        values = rng.sample(range(limit), count)
        for good in (values, sorted(values), list(range(count))):
            yield ListCase(good, limit, distinct=True)
            yield ListCase(good, limit, 4096, 1 << 46, distinct=True)
            yield ListCase(good, max(good, default=0) + 1)
        yield ListCase(values, limit, items=count + 1)
        for place in {0, count // 2, count - 1} if count else ():
            for bad in (
                -1,
                limit,
                1 << 63,
                1 << 70,
                True,
                False,
                1.0,
                None,
                "1",
                Whole(1),
                Indexed(),
            ):
                yield ListCase([*values[:place], bad, *values[place + 1 :]], limit)
            repeated = [*values[:place], values[place - 1], *values[place + 1 :]]
            yield ListCase(repeated, limit, distinct=True)
            yield ListCase(repeated, limit)


def wrong_conversions(state: State, name: str) -> list[str]:
    """What the transport converts, but not as the interface says."""
    convert = load_transport(name)[1].convert_list
    if all(convert([1], 2, 1, 0, array("q", [0]), distinct) == -1 for distinct in (True, False)):
        return []  # it leaves lists to core
    found = (wrong(convert, case) for case in cases())
    return [short_repr(text) for text in found if text]

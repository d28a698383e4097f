"""Bytes read as a sequence of choices: any input is a program; a changed byte changes little of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

Path = tuple[str | int, ...]

INTEGERS = [
    0, 1, 2, 3, 7, 64, 4096, 1 << 16, 1 << 32, 1 << 40, (1 << 40) + 64, 1 << 62, (1 << 63) - 1,
    1 << 63, (1 << 64) - 1, 1 << 64, -1,
]  # fmt: skip
FLOATS = [0.001, 1.0, 2147483.0, 0.0, -1.0, 1e300]
TEXTS = [
    "", "pair", "other", "shm", "x" * 80, "x" * 81, "0" * 32, "f" * 32, "took", "replaced", "refused",
    "request", "prefix", "AAAAAAAAAAA=", "AAAAAAAAAAAAAAAAAAAAAA==", "AAA=", "\x00", "\ud800",
]  # fmt: skip
ANYTHING: list[Any] = [None, True, 0, 1.5, "text", [], {}, [[1, 2]], [{}], -(1 << 70), "9" * 400]


class Choices:
    """Reads an input from its beginning; after its end every choice is the first one."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def over(self) -> bool:
        """Whether nothing is left."""
        return self._at >= len(self._data)

    def byte(self) -> int:
        """The next byte."""
        return (self.take(1) or b"\0")[0]

    def take(self, count: int) -> bytes:
        """The next bytes, or those that are left."""
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken

    def pick(self, choices: Sequence[T]) -> T:
        """One of them; the first 256 can be chosen."""
        return choices[self.byte() % len(choices)]


def tampered(data: bytes, choices: Choices, others: Sequence[bytes]) -> bytes:
    """What becomes of bytes on their way: mostly nothing, else one change, or another one's bytes."""
    how = choices.byte()
    if how < 128:
        return data
    at = choices.byte() % (len(data) + 1)
    match how % 8:
        case 0:
            bit = 1 << how // 8 % 8
            return data[:at] + bytes(byte ^ bit for byte in data[at : at + 1]) + data[at + 1 :]
        case 1:
            return data[:at]
        case 2:
            return data[:at] + choices.take(1 + choices.byte() % 40) + data[at:]
        case 3:
            return data[:at] + data[at + 1 :]
        case 4:
            return data + data
        case 5:
            return choices.take(len(data))
        case _:
            return choices.pick(others) if others else b""


def changed(message: dict[str, Any], choices: Choices, names: Sequence[str]) -> dict[str, Any]:
    """A message with one to three values changed, mostly to others of their types."""
    made = copy.deepcopy(message)
    for _ in range(1 + choices.byte() % 3):
        paths = [path for path in _paths(made) if path != ("kind",)]
        if paths:
            *outer, last = choices.pick(paths)
            holder: Any = made
            for step in outer:
                holder = holder[step]
            holder[last] = copy.deepcopy(_other(holder[last], choices, names))
    return made


def _paths(value: Any, at: Path = ()) -> Iterator[Path]:
    items: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(value, dict):
        items = iter(value.items())
    elif isinstance(value, list):
        items = iter(enumerate(value))
    for key, inner in items:
        yield (*at, key)
        yield from _paths(inner, (*at, key))


def _other(value: Any, choices: Choices, names: Sequence[str]) -> Any:
    if choices.byte() % 8 == 7:
        return choices.pick(ANYTHING)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return choices.pick([value + 1, value - 1, choices.byte(), *INTEGERS])
    if isinstance(value, float):
        return choices.pick(FLOATS)
    if isinstance(value, str):
        return choices.pick([*names, *TEXTS])
    if isinstance(value, list):
        return choices.pick([[], value[:-1], value + value, value * 40])
    return choices.pick(ANYTHING)

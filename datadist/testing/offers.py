"""Offers with larger ranges than their owner gave, where the ranges can be found in the bytes."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator

Encoding = Callable[[int], bytes]
Pattern = Callable[[bytes], bytes]


def widened(data: bytes, address: int, size: int, to: tuple[int, int]) -> bytes:
    """The offer; its range of ``size`` bytes at ``address`` goes from ``to[0]`` to ``to[1]`` instead.

    Finds addresses and sizes of 8 bytes in both byte orders, and those written in decimal or
    hexadecimal digits. Unchanged where there are none.
    """
    new = {address: to[0], address + size: to[1], size: to[1] - to[0]}
    for encode, exact in _encodings():
        if re.search(exact(encode(address)), data):
            return _replaced(data, new, encode, exact)
    return data


def _encodings() -> Iterator[tuple[Encoding, Pattern]]:
    """How numbers may be written, and the pattern of such a number."""
    for form in ("<q", ">q"):
        yield lambda number, form=form: struct.pack(form, number), re.escape  # type: ignore[misc]
    for style in ("d", "x"):
        yield (
            lambda number, style=style: format(number, style).encode(),  # type: ignore[misc]
            lambda text: rb"(?<![0-9a-f])" + text + rb"(?![0-9a-f])",
        )


def _replaced(data: bytes, new: dict[int, int], encode: Encoding, exact: Pattern) -> bytes:
    wanted = b"|".join(exact(encode(number)) for number in new)
    by_text = {encode(number): encode(value) for number, value in new.items()}
    return re.sub(wanted, lambda match: by_text[match.group()], data, flags=re.DOTALL)

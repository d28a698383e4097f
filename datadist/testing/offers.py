"""Offers with larger ranges than their owner gave, where the ranges can be found in the bytes."""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from collections.abc import Callable, Iterator

Encoding = Callable[[int], bytes]
Pattern = Callable[[bytes], bytes]
DIGESTS: tuple[Pattern, ...] = (
    lambda data: hashlib.sha256(data).digest(),
    lambda data: struct.pack("<I", zlib.crc32(data)),
    lambda data: struct.pack(">I", zlib.crc32(data)),
)


def widened(data: bytes, address: int, size: int, to: tuple[int, int]) -> bytes:
    """The offer; its range of ``size`` bytes at ``address`` goes from ``to[0]`` to ``to[1]`` instead.

    Finds addresses and sizes of 8 bytes in both byte orders, and those written in decimal or
    hexadecimal digits; renews a digest at the end. Unchanged where there are no such numbers.
    """
    for digest in DIGESTS:
        content, end = data[: -len(digest(b""))], data[-len(digest(b"")) :]
        if digest(content) == end:
            content = _widened(content, address, size, to)
            return content + digest(content)
    return _widened(data, address, size, to)


def _widened(data: bytes, address: int, size: int, to: tuple[int, int]) -> bytes:
    new = {address: to[0], address + size: to[1], size: to[1] - to[0]}

    def found(encode: Encoding, exact: Pattern) -> int:
        return sum(bool(re.search(exact(encode(number)), data)) for number in new)

    # An address may be found in the wrong byte order by chance; hardly its size or its end as well.
    encode, exact = max(_encodings(), key=lambda encoding: found(*encoding))
    return _replaced(data, new, encode, exact) if re.search(exact(encode(address)), data) else data


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

"""Offers with larger ranges, for transports whose owners must check what they are asked for."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from datadist.testing.offers import widened

ADDRESSES = st.integers(1 << 32, (1 << 47) - 1)
SIZES = st.integers(1 << 12, 1 << 30)
FORMS: dict[str, Callable[[int, int], bytes]] = {
    "little": lambda begin, size: b"x" + struct.pack("<qq", begin, size) + b"y",
    "big": lambda begin, size: b"x" + struct.pack(">qq", begin, begin + size) + b"y",
    "json": lambda begin, size: json.dumps([[begin, begin + size]]).encode(),
    "hex": lambda begin, size: f"{begin:#x}+{size:#x};".encode(),
}


@pytest.mark.parametrize("form", FORMS)
@given(ADDRESSES, SIZES, st.integers(0, 1 << 20), st.integers(1, 1 << 20))
@example(1 << 40, 4096, 0, 1)  # in little byte order too, six bytes further
def test_ranges_are_found(form: str, address: int, size: int, before: int, after: int) -> None:
    low, high = address - before, address + size + after
    made = FORMS[form]
    assert widened(made(address, size), address, size, (low, high)) == made(low, high - low)


@given(st.binary(max_size=100), ADDRESSES, SIZES)
def test_offers_without_them_stay_as_they_are(data: bytes, address: int, size: int) -> None:
    assert widened(data, address, size, (address - 1, address + size + 1)) == data


@pytest.mark.parametrize(
    "digest",
    [lambda data: hashlib.sha256(data).digest(), lambda data: struct.pack("<I", zlib.crc32(data))],
)
def test_a_digest_at_the_end_is_renewed(digest: Callable[[bytes], bytes]) -> None:
    content, wider = (FORMS["little"](1 << 40, size) for size in (4096, 8192))
    new = widened(content + digest(content), 1 << 40, 4096, (1 << 40, (1 << 40) + 8192))
    assert new == wider + digest(wider)

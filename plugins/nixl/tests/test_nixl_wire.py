"""Messages, and what is refused of them."""

from __future__ import annotations

import numpy as np
import pytest
from datadist_nixl import wire
from datadist_nixl.memory import Vector
from datadist_nixl.wire import Refusal, WireError

SECRET = b"s" * wire.SECRET_BYTES


def vector(*values: int) -> Vector:
    return np.array(values, np.int64)


def test_a_request_comes_back_as_it_was() -> None:
    sent = vector(1 << 40, 7), vector(9, 1 << 50), vector(5, 4096)
    request = wire.parse_request(memoryview(wire.pack_request(SECRET, "VRAM", 3, sent)), 3)
    assert (request.secret, request.memory, request.device) == (SECRET, "VRAM", 3)
    for came, expected in zip((request.here, request.there, request.length), sent, strict=True):
        np.testing.assert_array_equal(came, expected)


@pytest.mark.parametrize(
    "length", [(0,), (-1,), (wire.MAX_PIECE + 1,), (1 << 62, 1 << 62), (5, -5)]
)
def test_lengths_that_cannot_be_are_refused(length: tuple[int, ...]) -> None:
    addresses = vector(*range(1, 1 + len(length)))
    body = wire.pack_request(SECRET, "DRAM", 0, (addresses, addresses, vector(*length)))
    with pytest.raises(WireError, match="bytes, 1 to"):
        wire.parse_request(memoryview(body), 3)


def test_negative_addresses_are_refused() -> None:
    body = wire.pack_request(SECRET, "DRAM", 0, (vector(1), vector(-8), vector(8)))
    with pytest.raises(WireError, match="address -8"):
        wire.parse_request(memoryview(body), 3)


@pytest.mark.parametrize("cut", [0, 10, 23, 30, -1])
def test_requests_of_the_wrong_size_are_refused(cut: int) -> None:
    body = wire.pack_request(SECRET, "DRAM", 0, (vector(1), vector(1), vector(8)))
    with pytest.raises(WireError):
        wire.parse_request(memoryview(body[:cut]), 3)
    with pytest.raises(WireError):
        wire.parse_request(memoryview(body + b"."), 3)


def test_too_many_segments_are_refused() -> None:
    many = np.ones(wire.MAX_SEGMENTS + 1, np.int64)
    with pytest.raises(WireError, match="4097 segments"):
        wire.parse_request(memoryview(wire.pack_request(SECRET, "DRAM", 0, (many, many, many))), 3)


def test_memory_of_an_unknown_type_is_refused() -> None:
    body = bytearray(wire.pack_request(SECRET, "DRAM", 0, (vector(1), vector(1), vector(8))))
    body[wire.SECRET_BYTES + 6] = 9
    with pytest.raises(WireError, match="type 9"):
        wire.parse_request(memoryview(body), 3)


def test_a_greeting_of_another_format_is_refused() -> None:
    greeting = b"g" * wire.GREETING_BYTES
    good = wire.hello(greeting)
    assert wire.parse_hello(memoryview(good)) == greeting
    for bad in (b"", good[:-1], good + b".", b"X" + good[1:]):
        with pytest.raises(WireError):
            wire.parse_hello(memoryview(bad))


def test_refusals_and_metadata_come_back_as_they_were() -> None:
    body = memoryview(wire.pack_refusal(Refusal.OUTSIDE, "no"))
    assert wire.parse_refusal(body) == (Refusal.OUTSIDE, "no")
    assert wire.parse_metadata(memoryview(wire.pack_metadata(7, b"data"))) == (7, b"data")
    for bad in (b"", b"\xff"):
        with pytest.raises(WireError):
            wire.parse_refusal(memoryview(bad))
        with pytest.raises(WireError):
            wire.parse_metadata(memoryview(bad))

"""Messages and offers: what was packed is parsed, and everything else is refused by an error."""

from __future__ import annotations

import hashlib
import random
from array import array
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datadist.messaging.pieces import MAX_SEGMENTS
from datadist.messaging.wire import (
    HEADER_BYTES,
    MAX_BESIDE,
    Header,
    Kind,
    OfferFields,
    WireError,
    pack,
    pack_request,
    parse_header,
    parse_offer,
    parse_request,
    seal_offer,
)
from datadist.transport import Offer

SECRET, REPLY = b"s" * 16, b"r" * 16
int64 = st.integers(-(1 << 63), (1 << 63) - 1)
MOST = 1 << 20
OFFER = OfferFields(b"address", SECRET, True, 1 << 20, 4, [(4096, 8192), (8192, (1 << 63) - 1)])


def _request(lengths: list[int], kind: Kind = Kind.READ, target: bytes = b"") -> bytearray:
    room = sum(lengths) if kind is Kind.WRITE else 0
    vectors = array("q", range(len(lengths))), array("q", lengths)
    return pack_request(kind, SECRET, 3, REPLY, 1.5, *vectors, target, room)


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(Kind), st.binary(min_size=16, max_size=16), st.integers(0, (1 << 64) - 1))
def test_headers_come_back(kind: Kind, secret: bytes, number: int) -> None:
    assert parse_header(pack(kind, secret, number, b"body", 5)) == Header(kind, secret, number)


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=100))
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        parse_header(data)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(int64, st.integers(1, 1000)), min_size=1, max_size=50),
    st.sampled_from([Kind.READ, Kind.WRITE]), st.binary(max_size=30), st.floats(-1, 1e12),
)  # fmt: skip
def test_requests_come_back(
    segments: list[tuple[int, int]], kind: Kind, target: bytes, seconds: float
) -> None:
    addresses, lengths = (array("q", column) for column in zip(*segments, strict=True))
    room = sum(lengths) if kind is Kind.WRITE else 0
    message = pack_request(kind, SECRET, 3, REPLY, seconds, addresses, lengths, target, room)
    found = parse_request(message, kind, MOST)
    assert (list(found.addresses), list(found.lengths)) == (list(addresses), list(lengths))
    assert (found.reply, found.target, found.size) == (REPLY, target, sum(lengths))
    assert len(message) - found.data_at == room
    assert found.milliseconds <= (1 << 32) - 1


def test_the_largest_request_fits_beside_the_data() -> None:
    message = _request([1] * MAX_SEGMENTS, Kind.WRITE, b"t" * 1024)
    assert len(message) == MAX_BESIDE + MAX_SEGMENTS
    assert parse_request(message, Kind.WRITE, MOST).size == MAX_SEGMENTS


@pytest.mark.parametrize(
    "lengths",
    [
        [], [0], [-1], [MOST + 1], [MOST, 1], [5, -4], [(1 << 63) - 1, (1 << 63) - 1, 2],
        [-(1 << 63)], [1] * (MAX_SEGMENTS + 1),
    ],
)  # fmt: skip
def test_requests_of_impossible_sizes_are_refused(lengths: list[int]) -> None:
    vectors = array("q", range(len(lengths))), array("q", lengths)
    message = pack_request(Kind.READ, SECRET, 3, REPLY, 1.5, *vectors)
    with pytest.raises(WireError):
        parse_request(message, Kind.READ, MOST)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 200), st.sampled_from([Kind.READ, Kind.WRITE]))
def test_requests_that_are_cut_or_too_long_are_refused(cut: int, kind: Kind) -> None:
    whole = _request([3, 4], kind, b"target")
    for message in (whole[: max(HEADER_BYTES, len(whole) - 1 - cut)], whole + bytes(cut + 1)):
        with pytest.raises(WireError):
            parse_request(message, kind, MOST)


@pytest.mark.parametrize(("at", "value"), [(20, 0xFFFFFFFF), (24, 0xFFFF)])
def test_huge_counts_are_refused(at: int, value: int) -> None:
    message = _request([3, 4])
    width = 4 if at == 20 else 2
    message[HEADER_BYTES + at : HEADER_BYTES + at + width] = value.to_bytes(width, "little")
    with pytest.raises(WireError):
        parse_request(message, Kind.READ, MOST)


def test_offers_come_back() -> None:
    assert parse_offer(seal_offer(OFFER)) == OFFER
    assert parse_offer(seal_offer(replace(OFFER, ranges=[]))).ranges == []


def test_damaged_offers_are_refused() -> None:
    whole = seal_offer(OFFER)
    rng = random.Random(1)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        with pytest.raises(WireError, match=r"format|digest"):
            parse_offer(bytes(damaged))
    for end in range(len(whole)):
        with pytest.raises(WireError):
            parse_offer(whole[:end])


@pytest.mark.parametrize(
    "change",
    [{"piece": 0}, {"piece": 1}, {"piece": 4095}, {"window": 0}, {"address": b"a" * 70_000}],
)
def test_offers_of_impossible_values_are_refused(change: dict[str, int | bytes]) -> None:
    with pytest.raises(WireError):
        parse_offer(seal_offer(replace(OFFER, **change)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "ranges",
    [
        [(0, 0)], [(8, 4)], [(-8, 8)], [(0, 16), (8, 24)], [(16, 24), (0, 8)], [(0, 16), (0, 16)],
        [(0, 32), (8, 16)], [((1 << 63) - 4096, -(1 << 63))],
    ],
)  # fmt: skip
def test_ranges_out_of_order_are_refused(ranges: list[tuple[int, int]]) -> None:
    with pytest.raises(WireError, match="its range from"):
        parse_offer(seal_offer(replace(OFFER, ranges=ranges)))


def test_as_many_ranges_are_taken_as_an_engine_may_have() -> None:
    ranges = [(8 * n, 8 * n + 8) for n in range(Offer.MAX_REGIONS + 1)]
    assert parse_offer(seal_offer(replace(OFFER, ranges=ranges[1:]))).ranges == ranges[1:]
    with pytest.raises(WireError, match=f"{len(ranges)} ranges, at most {len(ranges) - 1}"):
        parse_offer(seal_offer(replace(OFFER, ranges=ranges)))


edges = st.lists(st.integers(0, (1 << 63) - 1), min_size=2, max_size=20, unique=True)


@settings(deadline=None, max_examples=50)
@given(edges.map(sorted), st.randoms(use_true_random=False))
def test_ranges_come_back_in_their_order_only(found: list[int], rng: random.Random) -> None:
    ranges = list(zip(found[::2], found[1::2], strict=False))
    assert parse_offer(seal_offer(replace(OFFER, ranges=ranges))).ranges == ranges
    mixed = rng.sample(ranges, len(ranges))
    if mixed != ranges:
        with pytest.raises(WireError):
            parse_offer(seal_offer(replace(OFFER, ranges=mixed)))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 60), st.binary(min_size=1, max_size=8))
def test_offers_with_numbers_that_do_not_match_are_refused(at: int, other: bytes) -> None:
    """The digest is right: such an offer was made by somebody who means harm."""
    content = bytearray(seal_offer(OFFER)[:-32])
    begin = len(b"datadist messaging offer 1\n") + 17 + at
    content[begin : begin + len(other)] = other
    data = bytes(content) + hashlib.sha256(content).digest()
    try:
        found = parse_offer(data)
    except WireError:
        return
    assert len(seal_offer(found)) == len(data)

"""Offers, also damaged and hostile ones: they are taken, or refused in words."""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest
from datadist_rdma.offer import MAX_PAIRS, RegionOffer, make_offer, parse_offer
from datadist_rdma.queue_pair import End
from hypothesis import given, settings
from hypothesis import strategies as st

from datadist.transport import LinkError, Offer

ADDRESS = bytes(10) + b"\xff\xff\x0a\x00\x00\x01"
ENDS = [End(77, 5, ADDRESS, 5, 16), End(78, 6, ADDRESS, 5, 16)]
REGION = {"address": 4096, "size": 100, "key": 3}
PAIR = {"number": 77, "psn": 5}
VERSION_1 = {
    "version": 1, "queue_pair": 77, "psn": 5, "gid": ADDRESS.hex(), "mtu": 5, "reads": 16,
    "writable": False, "regions": [REGION],
}  # fmt: skip
numbers24 = st.integers(0, (1 << 24) - 1)


def _good() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(make_offer(ENDS, False, []))
    return {**data, "regions": [dict(REGION)]}


def _refused(data: bytes) -> str:
    with pytest.raises(LinkError, match="rank 1") as caught:
        parse_offer(1, data)
    assert caught.value.rank == 1
    return str(caught.value)


def test_an_offer_comes_through() -> None:
    data = parse_offer(1, json.dumps(_good()).encode())
    assert data.ends == ENDS
    assert not data.writable
    assert [(r.address, r.size, r.key) for r in data.regions] == [(4096, 100, 3)]


def test_the_most_regions_and_queue_pairs_fit() -> None:
    regions = [
        RegionOffer.model_construct(address=4096 * n, size=4096, key=(1 << 32) - 1)
        for n in range(1, Offer.MAX_REGIONS + 1)
    ]
    ends = [End(2 + n, 5, ADDRESS, 5, 16) for n in range(MAX_PAIRS)]
    data = make_offer(ends, True, regions)
    assert len(data) <= Offer.MAX_DATA
    assert parse_offer(1, data).ends == ends


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"version": 1}, "version: it is 1, this release needs 2: install the same release"),
        ({"version": "2"}, "version: it is '2'"),
        ({"version": [2] * 1000}, "version: it is 1000 elements"),
        ({"queue_pairs": []}, "queue_pairs"),
        ({"queue_pairs": [PAIR, PAIR]}, "has one queue pair twice"),
        ({"queue_pairs": [{"number": n, "psn": 0} for n in range(2, 67)]}, "queue_pairs"),
        ({"queue_pairs": {"0": PAIR}}, "queue_pairs"),
        ({"queue_pairs": [{"number": 1 << 24, "psn": 5}]}, "queue_pairs.0.number"),
        ({"queue_pairs": [{"number": 1, "psn": 5}]}, "queue_pairs.0.number"),
        ({"queue_pairs": [{"number": 77, "psn": -1}]}, "queue_pairs.0.psn"),
        ({"queue_pairs": [{"number": 77}]}, "queue_pairs.0.psn"),
        ({"queue_pairs": [{**PAIR, "gid": ADDRESS.hex()}]}, "queue_pairs.0.gid"),
        ({"gid": "0" * 31}, "gid"),
        ({"gid": "0" * 32 + "\n"}, "gid"),
        ({"gid": "0" * 32}, "has ::, which is no address of a host"),
        ({"gid": "ff02" + "0" * 27 + "1"}, "has ff02::1, which is no"),
        ({"gid": "0" * 20 + "ffffe0000001"}, "has 224.0.0.1, which is no"),
        ({"gid": "0" * 20 + "ffffffffffff"}, "has 255.255.255.255, which is no"),
        ({"mtu": 0}, "mtu"),
        ({"mtu": 6}, "mtu"),
        ({"reads": 0}, "reads"),
        ({"reads": "16"}, "reads"),
        ({"reads": 1e400}, "valid"),
        ({"writable": 1}, "writable"),
        ({"more": 1}, "more"),
        ({"regions": [{**REGION, "address": 0}]}, "regions.0.address"),
        ({"regions": [{**REGION, "size": 0}]}, "regions.0.size"),
        ({"regions": [{**REGION, "size": -100}]}, "regions.0.size"),
        ({"regions": [{**REGION, "key": 1 << 32}]}, "regions.0.key"),
        ({"regions": [{**REGION, "address": 1 << 64}]}, "regions.0.address"),
        ({"regions": [{"address": 2**63 - 2, "size": 3, "key": 0}]}, "beyond memory"),
        ({"regions": [REGION, REGION]}, "overlap at 0x1000"),
        ({"regions": [{**REGION, "address": a, "size": 8} for a in (16, 8, 20)]}, "overlap at 0x14"),
    ],
)  # fmt: skip
def test_offers_are_checked(changes: dict[str, Any], text: str) -> None:
    assert text in _refused(json.dumps({**_good(), **changes}).encode())


def test_an_older_release_is_named() -> None:
    text = _refused(json.dumps(VERSION_1).encode())
    assert "it is 1, this release needs 2: install the same release of datadist-rdma" in text


@pytest.mark.parametrize("name", [*json.loads(make_offer(ENDS, False, []))])
def test_nothing_may_be_missing(name: str) -> None:
    data = _good()
    del data[name]
    assert name in _refused(json.dumps(data).encode())


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_a_truncated_offer_is_refused(length: int) -> None:
    whole = json.dumps(_good()).encode()
    _refused(whole[: length % len(whole)])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=10,
)
places = st.sampled_from(
    [(name,) for name in _good()]
    + [("regions", 0, name) for name in REGION]
    + [("queue_pairs", 1, name) for name in PAIR]
    + [("regions", 0), ("queue_pairs", 0)]
)


@settings(deadline=None)
@given(places, json_values)
def test_any_value_anywhere_is_taken_as_it_is_or_refused(place: Any, value: Any) -> None:
    data = _good()
    *path, last = place
    target: Any = data
    for step in path:
        target = target[step]
    target[last] = value
    text = json.dumps(data).encode()
    try:
        taken = parse_offer(1, text)
    except LinkError:
        assert len(_refused(text)) < 1000
    else:
        assert json.loads(taken.model_dump_json()) == data


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    _refused(data)


def _is_unicast(ip: IPv4Address | IPv6Address) -> bool:
    mapped = isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None
    return not (ip.is_multicast or ip.is_unspecified or mapped)


unicast = st.ip_addresses(v=6).filter(_is_unicast)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(2, (1 << 24) - 1), numbers24), min_size=1, max_size=MAX_PAIRS,
             unique_by=lambda each: each[0]),
    unicast,
    st.integers(1, 5), st.integers(1, 255), st.booleans(),
)  # fmt: skip
def test_what_is_made_is_read(
    pairs: list[tuple[int, int]],
    ip: IPv4Address | IPv6Address,
    mtu: int,
    reads: int,
    writable: bool,
) -> None:
    ends = [End(number, psn, ip.packed, mtu, reads) for number, psn in pairs]
    data = parse_offer(1, make_offer(ends, writable, []))
    assert (data.ends, data.writable) == (ends, writable)

"""Offers, also damaged and hostile ones: they are taken, or refused in words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from datadist_hccl.offer import END, parse_offer
from hypothesis import given, settings
from hypothesis import strategies as st

from datadist.transport import LinkError, Offer

REGION = {"address": 4096, "size": 64, "placement": 1}
RESOURCE = {"version": "1.0", "server_id": "one", "device_id": 0, "device_ip": "10.1.0.1"}


def _good(**changes: Any) -> dict[str, Any]:
    good = {"version": 1, "writable": True, "regions": [dict(REGION)], "resource": dict(RESOURCE)}
    return good | changes


def _at(*ranges: tuple[int, int]) -> list[dict[str, int]]:
    return [{**REGION, "address": address, "size": size} for address, size in ranges]


def _refused(data: bytes) -> str:
    with pytest.raises(LinkError, match="the offer of rank 1 is not valid") as caught:
        parse_offer(1, Offer(data))
    assert caught.value.rank == 1
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def test_an_offer_comes_through() -> None:
    data = parse_offer(1, Offer(json.dumps(_good()).encode()))
    assert [(r.address, r.size, r.placement) for r in data.regions] == [(4096, 64, 1)]
    assert data.writable
    assert data.resource is not None
    assert data.resource.device_ip == "10.1.0.1"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"version": 2}, "version: it is 2, this release needs 1: install the same release"),
        ({"version": "1"}, "version: it is '1'"),
        ({"version": [1] * 1000}, "version: it is 1000 elements"),
        ({"writable": 1}, "writable"),
        ({"more": 1}, "more"),
        ({"regions": {}}, "regions"),
        ({"regions": [{"address": 1}]}, "regions.0.size"),
        ({"regions": _at((0, 64))}, "regions.0.address"),
        ({"regions": _at((64, 0))}, "regions.0.size"),
        ({"regions": _at((64, -64))}, "regions.0.size"),
        ({"regions": _at((1 << 64, 64))}, "regions.0.address"),
        ({"regions": [{**REGION, "placement": 2}]}, "regions.0.placement"),
        ({"regions": _at((1 << 62, 1 << 62))}, "ends beyond memory"),
        ({"regions": _at((END, 1))}, "ends beyond memory"),
        ({"regions": _at((4096, 64), (4100, 64))}, "overlaps another one"),
        ({"regions": _at((64, 64), (64, 1))}, "overlaps another one"),
        ({"regions": _at((64, 1), (64, 64))}, "overlaps another one"),
        ({"resource": {**RESOURCE, "version": "1.1"}}, "resource.version"),
        ({"resource": {**RESOURCE, "device_id": 16}}, "resource.device_id"),
        ({"resource": {**RESOURCE, "device_port": 0}}, "resource.device_port"),
        ({"resource": {**RESOURCE, "server_id": ""}}, "resource.server_id"),
        ({"resource": {**RESOURCE, "server_id": "x" * 65}}, "resource.server_id"),
        ({"resource": {**RESOURCE, "device_ip": "1" * 257}}, "resource.device_ip"),
        ({"resource": {**RESOURCE, "more": 1}}, "resource.more"),
    ],
)
def test_offers_are_checked(changes: dict[str, Any], text: str) -> None:
    assert text in _refused(json.dumps(_good(**changes)).encode())


@pytest.mark.parametrize("name", ["version", "writable", "regions"])
def test_nothing_may_be_missing(name: str) -> None:
    data = _good()
    del data[name]
    assert name in _refused(json.dumps(data).encode())


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_a_truncated_offer_is_refused(length: int) -> None:
    whole = json.dumps(_good()).encode()
    _refused(whole[: length % len(whole)])


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    _refused(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=10,
)
places = st.sampled_from(
    [(name,) for name in _good()]
    + [("regions", 0, name) for name in REGION]
    + [("resource", name) for name in RESOURCE]
    + [("regions", 0)]
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
        taken = parse_offer(1, Offer(text))
    except LinkError:
        _refused(text)
    else:
        assert json.loads(taken.model_dump_json(exclude_unset=True)) == data

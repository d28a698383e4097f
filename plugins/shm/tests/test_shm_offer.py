"""What an offer may say of the peer's memory."""

from __future__ import annotations

import json

import pytest
from datadist_shm.offer import parse_offer
from hypothesis import given
from hypothesis import strategies as st

from datadist.transport import LinkError

BASE = 1 << 40
Range = tuple[int, int]


def _offer(ranges: list[Range]) -> bytes:
    regions = [
        {"id": number, "address": address, "size": size, "fd": None}
        for number, (address, size) in enumerate(ranges)
    ]
    return json.dumps({"version": 1, "writable": False, "regions": regions, "fence": None}).encode()


@pytest.mark.parametrize(
    ("ranges", "where"),
    [
        ([(BASE, 100), (BASE + 99, 10)], BASE + 99),
        ([(BASE + 99, 10), (BASE, 100)], BASE + 99),
        ([(BASE, 100), (BASE, 100)], BASE),
        ([(BASE, 100), (BASE, 1)], BASE),
        ([(BASE, 100), (BASE + 10, 5)], BASE + 10),
        ([(BASE, 100), (BASE + 200, 100), (BASE + 299, 1)], BASE + 299),
        ([(1, (1 << 63) - 1), (BASE, 1)], BASE),
    ],
)
def test_regions_that_overlap_are_refused(ranges: list[Range], where: int) -> None:
    with pytest.raises(LinkError, match=f"offer of rank 3 overlap at {where:#x}") as error:
        parse_offer(3, _offer(ranges), 0)
    assert error.value.rank == 3


@pytest.mark.parametrize(
    "ranges", [[], [(BASE, 100)], [(BASE + 100, 1), (BASE, 100), (BASE + 101, 50)]]
)
def test_regions_may_touch(ranges: list[Range]) -> None:
    offer = parse_offer(3, _offer(ranges), 0)
    assert [(region.address, region.size) for region in offer.regions] == ranges


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 12)), max_size=5))
def test_every_overlap_is_found(ranges: list[Range]) -> None:
    places = [place for address, size in ranges for place in range(address, address + size)]
    try:
        parse_offer(3, _offer(ranges), 0)
    except LinkError:
        assert len(set(places)) < len(places)
    else:
        assert len(set(places)) == len(places)

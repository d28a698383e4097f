"""What an offer may say."""

from __future__ import annotations

import json
from typing import Any

import pytest
from datadist_nixl.offer import make_offer, parse_offer

from datadist.transport import LinkError

GOOD = make_offer("unix:datadist-nixl-0", b"g" * 32, b"s" * 16, True, [(1 << 40, 100, "DRAM", 0)])


def test_an_offer_comes_back_as_it_was() -> None:
    offer = parse_offer(1, GOOD)
    assert (offer.address, offer.writable) == ("unix:datadist-nixl-0", True)
    assert (offer.greeting, offer.secret) == ((b"g" * 32).hex(), (b"s" * 16).hex())
    assert [tuple(row) for row in offer.regions] == [(1 << 40, 100, "DRAM", 0)]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"version": 2}, "it is 2, this release needs 1"),
        ({"secret": "00"}, "secret"),
        ({"greeting": ""}, "greeting"),
        ({"address": "unix:../x"}, "address"),
        ({"address": "udp:1"}, "address"),
        ({"writable": 1}, "writable"),
        ({"regions": [[0, 8, "DRAM", 0]]}, "regions"),
        ({"regions": [[1, 1 << 63, "DRAM", 0]]}, "regions"),
        ({"regions": [[(1 << 63) - 1, 2, "DRAM", 0]]}, "ends beyond memory"),
        ({"regions": [[8, 8, "FILE", 0]]}, "is of 'FILE'"),
        ({"regions": [[8, 8, "DRAM", -1]]}, "regions"),
        ({"regions": [[8, 8, "DRAM", 0], [15, 8, "DRAM", 0]]}, "overlap at 0xf"),
        ({"more": 1}, "more"),
    ],
)
def test_offers_that_cannot_be_are_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(LinkError, match=text) as error:
        parse_offer(3, json.dumps(json.loads(GOOD) | change).encode())
    assert error.value.rank == 3


@pytest.mark.parametrize("data", [b"", GOOD[:-5], b"\xff" * 40, b"[]", b"{}"])
def test_bytes_that_are_no_offer_are_refused(data: bytes) -> None:
    with pytest.raises(LinkError):
        parse_offer(3, data)

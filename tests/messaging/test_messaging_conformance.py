"""Transports made with the base class pass the conformance kit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from datadist.testing import TransportConformance, installed


@pytest.fixture(scope="module", autouse=True)
def _installed() -> Iterator[None]:
    names = {"pair": "PairTransport", "putting": "PuttingTransport", "polled": "PolledTransport"}
    with installed({name: f"tests.pair_engine:{kind}" for name, kind in names.items()}):
        yield


class TestPairTransport(TransportConformance):
    """An engine that sends, with a descriptor to wait on."""

    transport = "pair"

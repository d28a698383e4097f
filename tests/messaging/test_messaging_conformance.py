"""A transport made with the base class passes the conformance kit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from datadist.testing import TransportConformance, installed


@pytest.fixture(scope="module", autouse=True)
def _installed() -> Iterator[None]:
    with installed({"pair": "tests.pair_engine:PairTransport"}):
        yield


class TestPairTransport(TransportConformance):
    """An engine that sends, with a descriptor to wait on."""

    transport = "pair"
    trusting_asker = "datadist.testing.messaging_asker:ask_for_anything"

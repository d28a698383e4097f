"""A transport that declares little passes what the conformance kit asks of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from datadist.testing import TransportConformance, installed


@pytest.fixture(scope="module", autouse=True)
def _installed() -> Iterator[None]:
    with installed({"modest": "tests.minimal_transport:MinimalTransport"}):
        yield


class TestModestTransport(TransportConformance):
    """No settings are needed."""

    transport = "modest"

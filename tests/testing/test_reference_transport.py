"""The reference transport passes the kit that it illustrates."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from datadist.testing import TransportConformance, installed


@pytest.fixture(scope="module", autouse=True)
def _installed() -> Iterator[None]:
    with installed({"reference": "datadist.testing:ReferenceTransport"}):
        yield


class TestReferenceTransport(TransportConformance):
    """No settings are needed."""

    transport = "reference"

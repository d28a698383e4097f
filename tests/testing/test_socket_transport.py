"""A transport whose owners move the bytes passes the conformance kit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from datadist.testing import TransportConformance, installed


@pytest.fixture(scope="module", autouse=True)
def _installed() -> Iterator[None]:
    with installed({"sockets": "tests.socket_transport:SocketTransport"}):
        yield


class TestSocketTransport(TransportConformance):
    """Its askers check nothing as it is."""

    transport = "sockets"
    trusting_asker = "tests.faulty_socket_transports:check_nothing"

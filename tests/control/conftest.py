"""Fixtures: a control thread, and a server for engines of other hosts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from datadist.control.reactor import Reactor
from tests.tcp_server import Server


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    """A running reactor."""
    made = Reactor("test")
    yield made
    made.stop()


@pytest.fixture
def server(reactor: Reactor) -> Iterator[Server]:
    """A server at a free port of loopback."""
    made = Server(reactor)
    yield made
    made.close()

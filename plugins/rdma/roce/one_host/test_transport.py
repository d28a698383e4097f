"""The transport between processes of one host with soft-RoCE, without core."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from roce import spi
from roce.nodes import start_here
from roce.spi import MIB
from tests.nodes import Node, RemoteError

SIZE = 4 * MIB


class Two:
    """Rank 0, which moves, and rank 1, whose memory is moved."""

    def __init__(self) -> None:
        self.mover, self.owner = start_here({}), start_here({})
        self.local = self.mover.do(spi.start, SIZE)
        self.remote = self.owner.do(spi.start, SIZE)
        self.owner.do(spi.fill, 1)


@pytest.fixture(scope="module")
def two() -> Iterator[Two]:
    """Two processes with the transport open."""
    pair = Two()
    yield pair
    for node in (pair.mover, pair.owner):
        node.do(spi.stop)
        node.close()


@pytest.fixture
def link(two: Two, request: pytest.FixtureRequest) -> Iterator[str]:
    """A link of the two, closed afterwards; peers may write where the test is marked so."""
    name = request.node.name
    two.mover.do(spi.clear)
    access = "read_write" if "write" in name else "read"
    spi.connect(two.mover, two.owner, name, access)
    yield name
    two.mover.do(spi.close_link, name)
    two.owner.do(spi.close_link, name)


def test_read_one(two: Two, link: str) -> None:
    two.mover.do(spi.move, link, 1, "read", [two.local + 100], [two.remote + 7], [1001])
    got = np.frombuffer(two.mover.do(spi.content), np.uint8)
    assert (got[100:1101] == spi.expected(1, SIZE)[7:1008]).all()
    assert not got[:100].any()
    assert not got[1101:].any()

"""Two hosts, which are network namespaces with a cable between them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack

import nixl_ends
import nixl_skips
import pytest
from nixl_ends import Pair

from tests import hosts
from tests.hosts import Network

pytestmark = [nixl_skips.needed, hosts.needed]

SIZE = 16 << 20
VERBS = ("read", "write")


@pytest.fixture
def net() -> Iterator[Network]:
    """Two hosts."""
    with hosts.network(2) as net:
        yield net


@pytest.fixture
def pair(net: Network) -> Iterator[Pair]:
    """A process on each, linked."""
    with ExitStack() as stack:
        pair = Pair(SIZE, net)
        stack.callback(pair.close)
        yield pair


@pytest.mark.parametrize("verb", VERBS)
def test_bytes_move_between_hosts(pair: Pair, verb: str) -> None:
    for number, node in enumerate(pair.nodes):
        node.do(nixl_ends.fill, number)
    assert pair.move(verb, 30)[0] == ""
    here, there = (node.do(nixl_ends.digest) for node in pair.nodes)
    assert here == there


@pytest.mark.parametrize("verb", VERBS)
def test_a_cable_that_is_cut_ends_in_time(pair: Pair, net: Network, verb: str) -> None:
    """The call by its deadline; a read when it is forced; a write when core has lost the peer."""
    assert pair.move(verb, 30)[0] == ""
    pair.begin(verb, 4.0, 50_000)
    net.cut(1)
    kind, in_flight, seconds = pair.nodes[0].do(nixl_ends.moved)
    assert (kind, in_flight) == ("TransferTimeout", True)
    assert seconds < 30
    assert not pair.wait_settled(0.2)
    assert pair.nodes[0].do(nixl_ends.force) == ("" if verb == "read" else "TransferError")
    if verb == "write":
        assert not pair.nodes[0].do(nixl_ends.settled)
        pair.nodes[0].do(nixl_ends.lose)
    assert pair.wait_settled(30)
    pair.nodes[0].do(nixl_ends.fill, 9)
    before = pair.nodes[0].do(nixl_ends.digest)
    net.mend(1)
    time.sleep(0.3)
    assert pair.nodes[0].do(nixl_ends.digest) == before
    for node in pair.nodes:
        node.do(nixl_ends.lose)
        writers, seconds = node.do(nixl_ends.close)
        assert writers == []
        assert seconds < 20


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("end", [0, 1])
def test_who_is_killed_harms_nobody(pair: Pair, verb: str, end: int) -> None:
    """In the middle of a transfer; the other end was stopped meanwhile, and goes on."""
    killed, other = pair.nodes[end], pair.nodes[1 - end]
    assert pair.move(verb, 30)[0] == ""
    pair.begin(verb, 30.0, 50_000)
    other.pause()
    time.sleep(0.1)
    killed.kill()
    other.resume()
    if end == 1:
        assert other.do(nixl_ends.moved)[0] == "PeerLost"
        assert pair.wait_settled(30)
    other.do(nixl_ends.lose)
    other.do(nixl_ends.fill, 7)
    before = other.do(nixl_ends.digest)
    time.sleep(0.3)
    assert other.do(nixl_ends.digest) == before
    assert other.do(nixl_ends.close)[0] == []

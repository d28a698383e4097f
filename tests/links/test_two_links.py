"""Two links to one cluster: the newest serves, and the other one when that ends meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from datadist import BlocksCacheKey, RegisterMemStatus
from datadist.caches.publication import Publication
from tests import held, nodes
from tests.nodes import Node, pattern
from tests.waiting import until

Start = Callable[..., Node]
SHAPE = [4, 64]
KEY = BlocksCacheKey(1, 0)


def _newest(here: nodes.Here) -> Any:
    engine = here.live._engine
    assert engine is not None
    return list(engine._links.domains.values())[-1].attempt


def _begin(here: nodes.Here, what: str) -> None:
    """Start a transfer that has chosen the newest link and waits for another one there."""
    attempt = here.any["attempt"] = _newest(here)
    held.take_permits(here, attempt)
    call = nodes.push_blocks if what == "push" else nodes.pull_blocks
    mine, theirs = ([1], [2]) if what == "push" else ([2], [1])

    def run() -> None:
        try:
            call(here, KEY, "c", mine, theirs)
            here.any["outcome"] = "OK"
        except Exception as error:
            here.any["outcome"] = str(error)

    here.any["thread"] = threading.Thread(target=run)
    here.any["thread"].start()
    assert held.waiting(here, 1)


def _go_on(here: nodes.Here) -> str:
    """Let it have the link, which has ended."""
    attempt, deadline = here.any["attempt"], time.monotonic() + 20
    while not attempt.gone:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    held.release_permits(here)
    here.any["thread"].join(20)
    return str(here.any["outcome"])


def _totals(here: nodes.Here, direction: str) -> tuple[int, int]:
    total = here.live.stats()["total"][direction]
    return total["operations"], total["errors"]


@pytest.mark.parametrize("what", ["first pull", "pull", "push"])
@pytest.mark.parametrize("links", [1, 2])
def test_a_transfer_whose_link_ends_takes_the_other_one(
    start_node: Start, what: str, links: int
) -> None:
    options: dict[str, Any] = {"enable_remote_cache_accessible": True, "sync_kv_timeout": 60_000}
    peer, we = (start_node(c, **options) for c in (1, 2))
    peer.do(nodes.make, "c", "blocks", SHAPE, 2, KEY)
    peer.do(nodes.fill, "c", 1)
    we.do(nodes.make, "c", "blocks", SHAPE, 2)
    we.do(nodes.fill, "c", 2)
    for number in range(links):
        newest, _ = nodes.link_pair(peer, we, f"link {number}")
    if what == "pull":  # whose outcome is remembered
        we.do(nodes.pull_blocks, KEY, "c", [0], [0])
    direction = "push" if what == "push" else "pull"
    operations, _ = we.do(_totals, direction)
    we.do(_begin, what)
    peer.do(nodes.unlink, newest)
    outcome = we.do(_go_on)
    if links == 1:
        assert outcome.startswith("cluster 1 is not linked: link 'link 0'")
        assert "cluster 1 has unlinked" in outcome
        return
    assert outcome == "OK"
    assert we.do(_totals, direction) == (operations + 1, 0)
    where, row, seed, source = (peer, 2, 2, 1) if what == "push" else (we, 1, 1, 2)
    for tensor, array in enumerate(where.do(nodes.read, "c")):
        np.testing.assert_array_equal(array[row], pattern(seed, tensor, tuple(SHAPE))[source])


@pytest.mark.parametrize("newest", ["link", "link_clusters"])
def test_small_pulls_follow_the_newest_link_to_another_engine(
    start_node: Start, free_ports: Callable[[int], list[int]], newest: str
) -> None:
    """A decoder that pulled from one engine links with another one of the same cluster id."""
    (port,) = free_ports(1)
    options: dict[str, Any] = {"enable_remote_cache_accessible": True}
    listening = start_node(1, listen_ip_info=f"127.0.0.1:{port}", **options)
    other, decoder = start_node(1, **options), start_node(2, **options)

    def link(node: Node) -> None:
        if node is listening:
            assert decoder.do(nodes.link_clusters, [(1, port)])[0] == "LLM_SUCCESS"
        else:
            nodes.link_pair(other, decoder)

    first, second = (other, listening) if newest == "link_clusters" else (listening, other)
    for seed, node in enumerate((first, second, decoder)):
        node.do(
            nodes.make, "blocks", "blocks", [8, 64], 2, BlocksCacheKey(2 if seed == 2 else 1, 0)
        )
        node.do(nodes.fill, "blocks", seed)
    link(first)
    for _ in range(3):  # from the second on the known way
        decoder.do(nodes.pull_blocks, BlocksCacheKey(1, 0), "blocks", [1], [2])
    assert _block(decoder, 2) == _block(first, 1)
    decoder.do(nodes.push_blocks, BlocksCacheKey(1, 0), "blocks", src_blocks=[3], dst_blocks=[4])
    link(second)
    decoder.do(nodes.pull_blocks, BlocksCacheKey(1, 0), "blocks", [1], [2])
    assert _block(decoder, 2) == _block(second, 1), "the newest link serves"
    before = _block(first, 5)
    decoder.do(nodes.push_blocks, BlocksCacheKey(1, 0), "blocks", src_blocks=[3], dst_blocks=[5])
    assert _block(first, 5) == before
    assert _block(second, 5) == _block(decoder, 3)


def _block(node: Node, block: int) -> list[int]:
    return [int(array[block][0]) for array in node.do(nodes.read, "blocks")]


def _fail_once_open(here: nodes.Here) -> None:
    def fail(*_arguments: Any) -> None:
        raise RuntimeError("a defect")

    Publication.subscribe = fail  # type: ignore[assignment, method-assign]


def test_a_defect_in_a_second_link_ends_that_one_only(start_node: Start) -> None:
    mapping = {1: 0, 2: 1}
    first, second = start_node(1, pool=1 << 20), start_node(2, pool=1 << 20)
    good = nodes.link_pair(first, second, "good")
    second.do(_fail_once_open)
    bad = [node.do(nodes.link, "bad", mapping) for node in (first, second)]
    until(lambda: second.do(nodes.status, bad[1]) is RegisterMemStatus.FAILED)
    assert "opening the transport failed" in second.do(nodes.link_error, bad[1])
    until(lambda: first.do(nodes.status, bad[0]) is RegisterMemStatus.FAILED)
    for node, comm_id in zip((first, second), good, strict=True):
        assert node.do(nodes.status, comm_id) is RegisterMemStatus.OK
        assert node.do(nodes.link_error, comm_id) is None

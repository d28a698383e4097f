"""Four clusters on two hosts: shm inside of a host, another transport between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from datadist import BlocksCacheKey, CacheDesc, DataType
from tests import held, hosts, nodes
from tests.hosts import Network
from tests.nodes import Node

pytestmark = hosts.needed

Start = Callable[..., Node]
BOTH = "shm+netcopy"
MAPPING = {1: 0, 2: 1, 3: 2, 4: 3}
PLACES = {1: 0, 2: 0, 3: 1, 4: 1}
"""The host of each cluster."""


def _table(net: Network) -> str:
    return hosts.table([net.hosts[place].ipv4 for place in PLACES.values()])


def _backends(here: nodes.Here) -> dict[int, str]:
    """What links us with each cluster, as `stats` says."""
    return {row["cluster_id"]: row["backend"] for row in here.live.stats()["links"]}


@pytest.fixture
def four(start_on: Start, net: Network) -> dict[int, Node]:
    """Linked clusters, two on each host."""
    members = {
        cluster: start_on(place, cluster, transfer_backend=BOTH)
        for cluster, place in PLACES.items()
    }
    table = _table(net)
    ids = [node.do(nodes.link, "four", MAPPING, table) for node in members.values()]
    hosts.wait_all(list(members.values()), ids)
    return members


def test_all_pairs_are_verified_and_said(four: dict[int, Node]) -> None:
    for owner, one in four.items():
        for puller, two in four.items():
            if owner != puller:
                hosts.check_pull(one, owner, two)
    for cluster, node in four.items():
        here = PLACES[cluster]
        assert node.do(_backends) == {
            other: "shm" if place == here else "netcopy"
            for other, place in PLACES.items()
            if other != cluster
        }
        assert not node.do(nodes.log_of, "WARNING")


def _watches(here: nodes.Here) -> dict[int, bool]:
    """Whether reads from each cluster say what arrived meanwhile."""
    attempts = {
        cluster: held.attempt_with(here, cluster)
        for cluster in PLACES
        if cluster != here.live.cluster_id
    }
    return {
        cluster: attempt.capabilities[MAPPING[cluster]].watches_control
        for cluster, attempt in attempts.items()
    }


def test_what_a_transport_can_do_counts_for_its_own_peers(four: dict[int, Node]) -> None:
    assert four[1].do(_watches) == {2: True, 3: False, 4: False}
    assert four[4].do(_watches) == {1: False, 2: False, 3: True}


def test_the_end_of_a_near_or_far_member_is_noticed(four: dict[int, Node]) -> None:
    four[2].kill()
    with pytest.raises(nodes.RemoteError, match="cluster 2"):
        four[1].do(_pull_of, 2)
    hosts.check_pull(four[3], 3, four[1])
    four[3].kill()
    with pytest.raises(nodes.RemoteError, match="cluster 3"):
        four[1].do(_pull_of, 3)
    hosts.check_pull(four[4], 4, four[1])


def _pull_of(here: nodes.Here, cluster: int) -> None:
    label = f"from {cluster}"
    if not nodes.has(here, label):
        nodes.make(here, label, "blocks", [8, 64], 4, None)
    nodes.pull_blocks(here, BlocksCacheKey(cluster, 0), label, [1], [2])


def test_registered_memory_is_reached_by_both_ways(four: dict[int, Node], net: Network) -> None:
    """Memory that is registered after linking is reached by neither before the next link."""
    for cluster, node in four.items():
        node.do(_register, cluster)
    for node in four.values():
        node.do(nodes.unlink, 1)
    table = _table(net)
    ids = [node.do(nodes.link, "again", MAPPING, table) for node in four.values()]
    hosts.wait_all(list(four.values()), ids)
    for owner in four:
        for puller, node in four.items():
            if owner != puller:
                assert node.do(_pull_registered, owner) == owner


def _register(here: nodes.Here, cluster: int) -> None:
    array = np.full(1024, cluster, np.int32)
    target = np.zeros(1024, np.int32)
    for label, tensor, key in (
        ("mine", array, BlocksCacheKey(cluster, 7)), ("target", target, None),
    ):  # fmt: skip
        desc = CacheDesc(1, [16, 64], DataType.DT_INT32)
        cache = here.live.cache_manager.register_blocks_cache(desc, [tensor.ctypes.data], key)
        here.any[label] = cache, tensor


def _pull_registered(here: nodes.Here, owner: int) -> Any:
    cache, tensor = here.any["target"]
    tensor[:] = 0
    here.live.cache_manager.pull_blocks(BlocksCacheKey(owner, 7), cache, [3], [5])
    values = set(tensor[5 * 64 : 6 * 64].tolist())
    assert len(values) == 1
    assert not tensor[: 5 * 64].any()
    return values.pop()


def test_one_side_that_names_another_backend_is_told(start_on: Start, net: Network) -> None:
    one = start_on(0, 1, transfer_backend=BOTH, link_total_time=5)
    two = start_on(1, 2, transfer_backend="netcopy", link_total_time=5)
    table = hosts.table([h.ipv4 for h in net.hosts[:2]])
    for node in (one, two):
        node.do(nodes.link, "pair", {1: 0, 2: 1}, table)
    said = hosts.why(one) + hosts.why(two)
    assert BOTH in said
    assert "netcopy" in said

"""Four clusters on two hosts: shm inside of a host, another transport between them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests import held, hosts, nodes
from tests.hosts import Network
from tests.links.four_clusters import (
    MAPPING,
    Four,
    test_all_pairs_are_verified_and_said,
    test_registered_memory_is_reached_by_both_ways,
    test_the_end_of_a_near_or_far_member_is_noticed,
)
from tests.nodes import Node

__all__ = [
    "test_all_pairs_are_verified_and_said",
    "test_registered_memory_is_reached_by_both_ways",
    "test_the_end_of_a_near_or_far_member_is_noticed",
]

pytestmark = hosts.needed

Start = Callable[..., Node]
BOTH = "shm+netcopy"
PLACES = {1: 0, 2: 0, 3: 1, 4: 1}
"""The host of each cluster."""


@pytest.fixture
def four(start_on: Start, net: Network) -> Four:
    """Linked clusters, two on each host."""
    members = {
        cluster: start_on(place, cluster, transfer_backend=BOTH)
        for cluster, place in PLACES.items()
    }
    addresses = {cluster: net.hosts[place].ipv4 for cluster, place in PLACES.items()}
    linked = Four(members, addresses, "netcopy")
    linked.link("four")
    return linked


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


def test_what_a_transport_can_do_counts_for_its_own_peers(four: Four) -> None:
    assert four.members[1].do(_watches) == {2: True, 3: False, 4: False}
    assert four.members[4].do(_watches) == {1: False, 2: False, 3: True}


def test_one_side_that_names_another_backend_is_told(start_on: Start, net: Network) -> None:
    one = start_on(0, 1, transfer_backend=BOTH)
    two = start_on(1, 2, transfer_backend="netcopy")
    table = hosts.table([h.ipv4 for h in net.hosts[:2]])
    for node in (one, two):
        node.do(nodes.link, "pair", {1: 0, 2: 1}, table)
    said = hosts.why(one) + hosts.why(two)
    assert BOTH in said
    assert "netcopy" in said

"""Four clusters on two hosts: shm inside of a host, nixl between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import nixl_skips
import pytest

from tests import hosts, netcopy, nodes
from tests.links.four_clusters import (
    Four,
    test_all_pairs_are_verified_and_said,
    test_registered_memory_is_reached_by_both_ways,
    test_the_end_of_a_near_or_far_member_is_noticed,
)

__all__ = [
    "test_all_pairs_are_verified_and_said",
    "test_registered_memory_is_reached_by_both_ways",
    "test_the_end_of_a_near_or_far_member_is_noticed",
]

pytestmark = [nixl_skips.needed, hosts.needed]

PLACES = {1: 0, 2: 0, 3: 1, 4: 1}
"""The host of each cluster."""


@pytest.fixture
def four(tmp_path: Path) -> Iterator[Four]:
    """Linked clusters, two on each host, which has a runtime directory of its own."""
    netcopy.publish(tmp_path)
    with ExitStack() as started:
        net = started.enter_context(hosts.network(2))
        members = {}
        for cluster, place in PLACES.items():
            run = tmp_path / f"run{place}"
            run.mkdir(mode=0o700, exist_ok=True)
            environ = {
                "DATADIST_RUNTIME_DIR": str(run),
                "DATADIST_AUTH_KEY": hosts.KEY,
                "DATADIST_NIXL_DEVICE": "eth0",
            }
            node = hosts.start(net.hosts[place], environ, str(tmp_path))
            started.callback(node.close)
            node.do(nodes.init, cluster, transfer_backend="shm+nixl")
            members[cluster] = node
        addresses = {cluster: net.hosts[place].ipv4 for cluster, place in PLACES.items()}
        linked = Four(members, addresses, "nixl")
        linked.link("four")
        yield linked

"""Four clusters on several hosts: shm inside of a host, another transport between hosts.

The tests here need a fixture ``four``; its modules import them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from datadist import BlocksCacheKey, CacheDesc, DataType
from tests import hosts, nodes
from tests.nodes import AnyNode

MAPPING = {1: 0, 2: 1, 3: 2, 4: 3}


@dataclass(frozen=True)
class Four:
    """Linked clusters; 1 and 2 are on one host, 3 is on another one, 4 on any but the first."""

    members: Mapping[int, AnyNode]
    addresses: Mapping[int, str]
    """Of the host of each cluster."""
    far: str
    """The transport between hosts."""

    def link(self, name: str) -> None:
        """Link all of them by one rank table."""
        table = hosts.table(list(self.addresses.values()))
        ids = [node.do(nodes.link, name, MAPPING, table) for node in self.members.values()]
        hosts.wait_all(list(self.members.values()), ids)

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Owner and puller: all 12."""
        return ((one, two) for one in self.members for two in self.members if one != two)

    def backend(self, one: int, two: int) -> str:
        """What has to link two clusters."""
        return "shm" if self.addresses[one] == self.addresses[two] else self.far


def backends(here: nodes.Here) -> dict[int, str]:
    """What links us with each cluster, as `stats` says."""
    return {row["cluster_id"]: row["backend"] for row in here.live.stats()["links"]}


def test_all_pairs_are_verified_and_said(four: Four) -> None:
    for owner, puller in four.pairs():
        hosts.check_pull(four.members[owner], owner, four.members[puller])
    for cluster, node in four.members.items():
        assert node.do(backends) == {
            other: four.backend(cluster, other) for other in four.members if other != cluster
        }
        assert node.do(nodes.warnings_of) == []


def test_the_end_of_a_near_or_far_member_is_noticed(four: Four) -> None:
    members = four.members
    members[2].kill()
    with pytest.raises(nodes.RemoteError, match="cluster 2"):
        members[1].do(pull_of, 2)
    hosts.check_pull(members[3], 3, members[1])
    members[3].kill()
    with pytest.raises(nodes.RemoteError, match="cluster 3"):
        members[1].do(pull_of, 3)
    hosts.check_pull(members[4], 4, members[1])


def pull_of(here: nodes.Here, cluster: int) -> None:
    """Pull a block of a cluster."""
    label = f"from {cluster}"
    if not nodes.has(here, label):
        nodes.make(here, label, "blocks", [8, 64], 4, None)
    nodes.pull_blocks(here, BlocksCacheKey(cluster, 0), label, [1], [2])


def test_registered_memory_is_reached_by_both_ways(four: Four) -> None:
    """Memory that is registered after linking is reached by neither before the next link."""
    for cluster, node in four.members.items():
        node.do(_register, cluster)
    for node in four.members.values():
        node.do(nodes.unlink, 1)
    four.link("again")
    for owner, puller in four.pairs():
        assert four.members[puller].do(_pull_registered, owner) == owner


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
    assert not tensor[6 * 64 :].any()
    return values.pop()

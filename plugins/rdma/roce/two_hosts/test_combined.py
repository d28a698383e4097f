"""Four clusters in two machines: shm inside of a machine, rdma between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from roce import combined, library
from roce.nodes import HERE, OTHER

from tests import hosts
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


@pytest.fixture
def four(tmp_path: Path) -> Iterator[Four]:
    """Linked clusters, two in each machine."""
    with ExitStack() as started:
        yield combined.linked({1: HERE, 2: HERE, 3: OTHER, 4: OTHER}, tmp_path, started)


def test_only_pulls_from_the_other_machine_use_the_adapter(four: Four) -> None:
    """The driver counts all packets, also those that stay in the machine."""
    for owner, puller in four.pairs():
        before = four.members[puller].do(library.packets)
        hosts.check_pull(four.members[owner], owner, four.members[puller])
        sent = four.members[puller].do(library.packets) - before
        assert (sent > 0) is (four.backend(owner, puller) == "rdma"), (owner, puller, sent)

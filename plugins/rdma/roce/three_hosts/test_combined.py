"""Four clusters in three machines, two of them in the first one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from roce import combined
from roce.nodes import HERE, OTHER, THIRD, lab, wait_for_other

from tests import hosts, nodes
from tests.links.four_clusters import (
    Four,
    pull_of,
    test_all_pairs_are_verified_and_said,
    test_registered_memory_is_reached_by_both_ways,
    test_the_end_of_a_near_or_far_member_is_noticed,
)

__all__ = [
    "test_all_pairs_are_verified_and_said",
    "test_registered_memory_is_reached_by_both_ways",
    "test_the_end_of_a_near_or_far_member_is_noticed",
]


@pytest.fixture(autouse=True)
def machines() -> None:
    """Both other machines are up."""
    for machine in (OTHER, THIRD):
        wait_for_other(machine=machine)


@pytest.fixture
def four(machines: None, tmp_path: Path) -> Iterator[Four]:
    """Linked clusters."""
    with ExitStack() as started:
        yield combined.linked({1: HERE, 2: HERE, 3: OTHER, 4: THIRD}, tmp_path, started)


def test_power_loss_of_a_machine_ends_the_links_with_it_only(four: Four) -> None:
    members = four.members
    hosts.check_pull(members[4], 4, members[3])
    lab(do="power_off", machine="c")
    try:
        for puller in (1, 3):
            with pytest.raises(nodes.RemoteError, match="cluster 4"):
                members[puller].do(pull_of, 4)
        for owner, puller in four.pairs():
            if 4 not in (owner, puller):
                hosts.check_pull(members[owner], owner, members[puller])
    finally:
        lab(do="power_on", machine="c")

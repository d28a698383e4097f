"""Links over hosts with a transport whose library brings the ranks together, as HCCL does."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from datadist import LLMException
from datadist.links import building
from tests import hosts, nodes
from tests.hosts import Network
from tests.nodes import Here, Node
from tests.waiting import until

pytestmark = hosts.needed

PAIR = {1: 0, 2: 1}
Start = Callable[..., Node]
NOWHERE = ["x.x.x.x", "y.y.y.y", "z.z.z.z", "w.w.w.w"]
"""Servers without an address: core has to find out by itself where they are."""


@pytest.fixture
def join_on(start_on: Start) -> Start:
    """Start a node on the transport that joins."""

    def start(number: int, cluster: int, **options: Any) -> Node:
        return start_on(number, cluster, transfer_backend="netjoin", **options)

    return start


def _begin(members: list[Node], mapping: dict[int, int], table: str | None = None) -> list[int]:
    chosen = table or hosts.table(NOWHERE[: len(mapping)])
    return [node.do(nodes.link, "joined", mapping, chosen) for node in members]


def test_two_hosts_find_each_other_without_an_address(join_on: Start, net: Network) -> None:
    members = [join_on(0, 1), join_on(1, 2)]
    for _ in range(3):
        ids = _begin(members, PAIR)
        hosts.wait_all(members, ids)
        hosts.check_pull(members[0], 1, members[1])
        hosts.check_pull(members[1], 2, members[0])
        for host in net.hosts:
            assert hosts.nobody_listens(host), "something listens although the link is complete"
        for node, comm_id in zip(members, ids, strict=True):
            node.do(nodes.unlink, comm_id)


def test_four_ranks_on_two_hosts_use_both_ways_to_meet(join_on: Start, net: Network) -> None:
    mapping = {1: 0, 2: 1, 3: 2, 4: 3}
    members = [join_on(number, cluster) for number, cluster in ((0, 1), (0, 2), (1, 3), (1, 4))]
    hosts.wait_all(members, _begin(members, mapping))
    for cluster, puller in ((1, 1), (2, 2), (3, 3), (4, 0)):
        hosts.check_pull(members[cluster - 1], cluster, members[puller])
    assert hosts.connections_come_to(net.hosts[0], 4)


def test_one_host_needs_no_key(join_on: Start) -> None:
    members = [join_on(0, cluster, key=None) for cluster in PAIR]
    hosts.wait_all(members, _begin(members, PAIR))
    hosts.check_pull(members[0], 1, members[1])


def test_one_server_meets_before_it_joins(join_on: Start) -> None:
    members = [join_on(0, cluster, key=None) for cluster in PAIR]
    table = nodes.table_for(PAIR)
    (comm_id,) = _begin(members[:1], PAIR, table)
    there = re.compile(r"cluster 2 \(rank 1\) is here .* has not called link with")
    until(lambda: bool(there.search(members[0].do(_missing, comm_id))))
    hosts.wait_all(members, [comm_id, *_begin(members[1:], PAIR, table)])
    hosts.check_pull(members[1], 2, members[0])


@pytest.mark.parametrize("without", [(0,), (1,), (0, 1)])
def test_without_a_key_hosts_do_not_talk(join_on: Start, without: tuple[int, ...]) -> None:
    members = [
        join_on(n, n + 1, **({"key": None} if n in without else {}), link_total_time=120)
        for n in range(2)
    ]
    began = time.monotonic()
    ids = _begin(members, PAIR)
    for node, comm_id in zip(members, ids, strict=True):
        assert "DATADIST_AUTH_KEY" in hosts.why(node, comm_id)
    assert time.monotonic() - began < 60, "this is known as soon as they have joined"


def test_another_key_is_named(join_on: Start) -> None:
    members = [
        join_on(0, 1, link_total_time=10),
        join_on(1, 2, link_total_time=10, key="another key of sixteen bytes"),
    ]
    ids = _begin(members, PAIR)
    for node, comm_id in zip(members, ids, strict=True):
        assert "DATADIST_AUTH_KEY" in hosts.why(node, comm_id)


def test_ranks_that_disagree_are_told(join_on: Start) -> None:
    members = [join_on(0, 1), join_on(1, 2, enable_remote_cache_accessible=True, local_comm_res="")]
    ids = _begin(members, PAIR)
    for node, comm_id in zip(members, ids, strict=True):
        assert "enable_remote_cache_accessible" in hosts.why(node, comm_id)


def test_tables_that_differ_are_compared_where_ranks_share_a_host(join_on: Start) -> None:
    members = [join_on(0, cluster, link_total_time=120) for cluster in (1, 2)]
    other = hosts.table([NOWHERE[0], "another"])
    ids = [*_begin(members[:1], PAIR), *_begin(members[1:], PAIR, other)]
    began = time.monotonic()
    for node, comm_id in zip(members, ids, strict=True):
        assert "'another'" in hosts.why(node, comm_id)
    assert time.monotonic() - began < 60, "this is known as soon as they meet"


def test_a_rank_that_never_comes(join_on: Start) -> None:
    one = join_on(0, 1, link_total_time=2)
    _begin([one], PAIR)
    assert "join" in hosts.why(one)


def test_unlink_and_finalize_end_the_joining(join_on: Start) -> None:
    one = join_on(0, 1, link_total_time=120)
    (comm_id,) = _begin([one], PAIR)
    time.sleep(0.3)
    began = time.monotonic()
    one.do(nodes.unlink, comm_id)
    assert time.monotonic() - began < 30, "the joining would take two minutes"
    two = join_on(1, 2)
    members = [one, two]
    hosts.wait_all(members, _begin(members, PAIR))
    hosts.check_pull(one, 1, two)
    three = join_on(2, 3, link_total_time=120)
    _begin([three], {3: 0, 4: 1})
    began = time.monotonic()
    three.do(nodes.finalize)
    assert time.monotonic() - began < 30
    assert not three.do(nodes.log_of, "ERROR")


def test_a_member_that_dies_breaks_the_link_and_comes_back(join_on: Start) -> None:
    one, two = join_on(0, 1), join_on(1, 2)
    ids = _begin([one, two], PAIR)
    hosts.wait_all([one, two], ids)
    two.kill()
    until(lambda: one.do(nodes.link_error, ids[0]) is not None)
    one.do(nodes.unlink, ids[0])
    two = join_on(1, 2)
    hosts.wait_all([one, two], _begin([one, two], PAIR))
    hosts.check_pull(two, 2, one)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_member_that_dies_while_they_join_can_come_back(join_on: Start, when: str) -> None:
    mapping = {1: 0, 2: 1, 3: 2}
    members = [join_on(number, number + 1, link_total_time=120) for number in range(2)]
    for node in members:
        node.do(_notice_soon)
    third = join_on(2, 3, environ={"NETJOIN_DIES": when}, link_total_time=120)
    ids = _begin(members, mapping)
    with pytest.raises((EOFError, OSError)):
        _link_and_die(third, mapping)
    until(lambda: all("was given up" in node.do(_missing, ids[0]) for node in members))
    again = join_on(2, 3, link_total_time=120)
    hosts.wait_all([*members, again], [*ids, *_begin([again], mapping)])
    hosts.check_pull(again, 3, members[0])
    hosts.check_pull(members[0], 1, again)
    hosts.check_pull(members[1], 2, members[0])


def _link_and_die(node: Node, mapping: dict[int, int]) -> None:
    _begin([node], mapping)
    node.do(_sleep, 30)


def _sleep(_here: Here, seconds: float) -> None:
    time.sleep(seconds)


def _notice_soon(_here: Here) -> None:
    building.CONTACT_SECONDS = 2.0


def _missing(here: Here, comm_id: int) -> str:
    """What `wait_link` says is missing, at once."""
    try:
        here.live.wait_link(comm_id, 1)
    except LLMException as error:
        return str(error)
    return ""


def test_the_same_domain_twice_is_refused(join_on: Start) -> None:
    members = [join_on(0, 1), join_on(1, 2)]
    hosts.wait_all(members, _begin(members, PAIR))
    (second,) = _begin(members[:1], PAIR)
    assert "is held already" in hosts.why(members[0], second)
    hosts.check_pull(members[0], 1, members[1])

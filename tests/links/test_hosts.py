"""Links between hosts, over TCP: real processes in network namespaces on a virtual switch."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests import hosts, nodes
from tests.hosts import Network
from tests.nodes import Node

pytestmark = hosts.needed

PAIR = {1: 0, 2: 1}
Start = Callable[..., Node]


def _link_all(members: list[Node], name: str, mapping: dict[int, int], table: str) -> list[int]:
    ids = [node.do(nodes.link, name, mapping, table) for node in members]
    hosts.wait_all(members, ids)
    return ids


@pytest.mark.parametrize("version", [4, 6])
def test_two_hosts_link_and_pull(start_on: Start, net: Network, version: int) -> None:
    addresses = [h.ipv4 if version == 4 else h.ipv6 for h in net.hosts[:2]]
    one, two = start_on(0, 1), start_on(1, 2)
    ids = _link_all([one, two], "pair", PAIR, hosts.table(addresses))
    hosts.check_pull(one, 1, two)
    hosts.check_pull(two, 2, one)
    two.do(nodes.unlink, ids[1])
    one.do(nodes.unlink, ids[0])
    assert one.do(nodes.warnings_of) == []


def test_three_hosts_link_through_rank_0(start_on: Start, net: Network) -> None:
    mapping = {1: 0, 2: 1, 3: 2}
    members = [start_on(number, number + 1) for number in range(3)]
    _link_all(members, "trio", mapping, hosts.table([h.ipv4 for h in net.hosts]))
    hosts.check_pull(members[0], 1, members[1])
    hosts.check_pull(members[1], 2, members[2])
    hosts.check_pull(members[2], 3, members[0])
    for host in net.hosts:
        assert hosts.nobody_listens(host), "something listens although the link is complete"


def test_ranks_that_share_a_host_meet_there(start_on: Start, net: Network) -> None:
    mapping = {1: 0, 2: 1, 3: 2, 4: 3}
    members = [start_on(number, cluster) for number, cluster in ((0, 1), (0, 2), (1, 3), (1, 4))]
    addresses = [net.hosts[n].ipv4 for n in (0, 0, 1, 1)]
    _link_all(members, "quad", mapping, hosts.table(addresses))
    hosts.check_pull(members[0], 1, members[3])
    hosts.check_pull(members[3], 4, members[1])
    one_each = "one session per pair of engines on different hosts"
    assert hosts.connections_come_to(net.hosts[0], 4), one_each


@pytest.mark.parametrize("key", [None, "another key"])
def test_a_wrong_key_lets_nobody_in(start_on: Start, net: Network, key: str | None) -> None:
    one, two = start_on(0, 1, link_total_time=7), start_on(1, 2, key=key, link_total_time=5)
    table = hosts.table([h.ipv4 for h in net.hosts[:2]])
    for node in (one, two):
        node.do(nodes.link, "pair", PAIR, table)
    theirs, ours = hosts.why(two), hosts.why(one)
    assert "DATADIST_AUTH_KEY" in theirs
    assert len([w for w in two.do(nodes.log_of, "WARNING") if "DATADIST_AUTH_KEY" in w]) == 1
    if key is not None:
        assert net.hosts[1].ipv4 in ours
        assert "DATADIST_AUTH_KEY" in ours


def test_no_address_names_the_variable(start_on: Start) -> None:
    one = start_on(0, 1, link_total_time=1)
    one.do(nodes.link, "pair", PAIR, hosts.table(["x.x.x.x", "y.y.y.y"]))
    assert "DATADIST_RENDEZVOUS" in hosts.why(one)


def test_the_variable_replaces_the_table(start_on: Start, net: Network) -> None:
    environ = {"DATADIST_RENDEZVOUS": f"[{net.hosts[0].ipv6}]:7000"}
    one, two = start_on(0, 1, environ=environ), start_on(1, 2, environ=environ)
    _link_all([one, two], "pair", PAIR, hosts.table(["x.x.x.x", "y.y.y.y"]))
    hosts.check_pull(one, 1, two)


def test_engines_of_different_jobs_never_link(start_on: Start, net: Network) -> None:
    table = hosts.table([host.ipv4 for host in net.hosts[:2]])
    first = start_on(0, 1, environ={"DATADIST_JOB": "a"}, link_total_time=5)
    second = start_on(1, 2, environ={"DATADIST_JOB": "b"}, link_total_time=5)
    for node in (first, second):
        node.do(nodes.link, "pair", {1: 0, 2: 1}, table)
    assert "belongs to job 'a', this engine to job 'b': set the same DATADIST_JOB" in hosts.why(
        second
    )
    nodes.said(first, "WARNING", "belongs to job 'b'")
    refused = [x for x in first.do(nodes.log_of, "WARNING") if "belongs to job 'b'" in x]
    assert len(refused) == 1, "it tries again and again, which is told of once"


def _link_refused(here: nodes.Here, mapping: dict[int, int], table: str) -> str:
    try:
        nodes.link(here, "pair", mapping, table)
    except Exception as error:
        return str(error)
    return "linked"


def test_engines_on_other_hosts_hear_of_a_refused_duplicate(start_on: Start, net: Network) -> None:
    table = hosts.table([host.ipv4 for host in net.hosts[:2]])
    first, far, duplicate = start_on(0, 1), start_on(1, 2), start_on(0, 1)
    ids = [node.do(nodes.link, "pair", {1: 0, 2: 1}, table) for node in (first, far)]
    hosts.wait_all([first, far], ids)
    assert "cluster id 1 belongs" in duplicate.do(_link_refused, {1: 0, 2: 1}, table)
    nodes.said(far, "WARNING", f"pid {duplicate.pid}")

"""Several servers: network namespaces with engines on the simulator, and nothing in common but HCCL.

The rank tables are those of real servers: addresses of devices, none of hosts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hccl_sim
import numpy as np
import pytest
from hccl_sim import engines

from datadist import BlocksCacheKey
from tests import hosts, nodes
from tests.hosts import Network
from tests.nodes import Here, Node
from tests.waiting import until

pytestmark = hosts.needed

Start = Callable[..., Node]
HCCS = {"HCCL_INTRA_ROCE_ENABLE": "0", "HCCL_INTRA_PCIE_ENABLE": "1"}
PORT = 26900


@pytest.fixture
def net() -> Iterator[Network]:
    """Three hosts on a switch."""
    with hosts.network(3) as network:
        yield network


@pytest.fixture
def start_on(net: Network, start_node: Start, tmp_path: Path) -> Start:
    """Start an engine with a paged cache on a host; each host has a runtime directory of its own."""

    def start(
        number: int, cluster: int, *, key: str | None = hosts.KEY,
        environ: dict[str, str] | None = None, **settings: Any,
    ) -> Node:  # fmt: skip
        run = tmp_path / f"host{number}"
        run.mkdir(mode=0o700, exist_ok=True)
        own = {"DATADIST_RUNTIME_DIR": str(run)} | (environ or {})
        node = start_node(own | ({} if key is None else {"DATADIST_AUTH_KEY": key}))
        node.do(hosts.enter, net.hosts[number].namespace)
        node.do(engines.paged_engine, cluster, "hccl", BlocksCacheKey(cluster, 0), **settings)
        return node

    return start


def _begin(members: list[Node], mapping: dict[int, int], table: str) -> list[int]:
    return [node.do(nodes.link, "servers", mapping, table) for node in members]


def _check_pull(owner: Node, cluster: int, puller: Node, own: int) -> None:
    for node, seed in ((owner, cluster), (puller, own)):
        node.do(engines.fill, "paged", seed)
    key = BlocksCacheKey(cluster, 0)
    puller.do(nodes.pull_blocks, key, "paged", engines.SOURCE, engines.TARGET)
    np.testing.assert_array_equal(puller.do(engines.contents, "paged"), engines.moved(cluster, own))


def test_the_documented_example_between_two_servers(start_on: Start, net: Network) -> None:
    members = [start_on(0, 1), start_on(1, 2)]
    for _ in range(2):
        ids = _begin(members, engines.PAIR, engines.CONTRACT_TABLE)
        hosts.wait_all(members, ids)
        _check_pull(members[0], 1, members[1], 2)
        _check_pull(members[1], 2, members[0], 1)
        for host in net.hosts:
            assert hosts.nobody_listens(host), "something listens although the link is complete"
        for node, comm_id in zip(members, ids, strict=True):
            node.do(nodes.unlink, comm_id)
    for node in members:
        assert node.do(engines.live)["communicators"] == 0


def test_pushes_between_two_servers(start_on: Start) -> None:
    members = [start_on(n, n + 1, local_comm_res="") for n in range(2)]
    hosts.wait_all(members, _begin(members, engines.PAIR, engines.CONTRACT_TABLE))
    members[0].do(nodes.push_blocks, BlocksCacheKey(2, 0), "paged", engines.SOURCE, engines.TARGET)
    np.testing.assert_array_equal(members[1].do(engines.contents, "paged"), engines.moved(1, 2))


def test_four_ranks_on_two_servers_use_hccs_and_rdma(start_on: Start, net: Network) -> None:
    mapping = {cluster: cluster - 1 for cluster in range(1, 5)}
    members = [
        start_on(number, cluster, environ=HCCS, device_id=device)
        for number, cluster, device in ((0, 1, 0), (0, 2, 1), (1, 3, 0), (1, 4, 1))
    ]
    hosts.wait_all(members, _begin(members, mapping, hccl_sim.table(4, 2)))
    for owner, puller in ((1, 2), (2, 3), (3, 4), (4, 1)):
        _check_pull(members[owner - 1], owner, members[puller - 1], puller)
    assert hosts.connections_come_to(net.hosts[0], 4)


@pytest.mark.parametrize("without", [(0,), (0, 1)])
def test_without_a_key_the_reason_is_said_as_soon_as_hccl_has_met(
    start_on: Start, without: tuple[int, ...]
) -> None:
    members = [start_on(n, n + 1, **({"key": None} if n in without else {})) for n in range(2)]
    began = time.monotonic()
    ids = _begin(members, engines.PAIR, engines.CONTRACT_TABLE)
    for node, comm_id in zip(members, ids, strict=True):
        assert "DATADIST_AUTH_KEY" in hosts.why(node, comm_id)
        node.do(nodes.unlink, comm_id)
        assert node.do(engines.live)["communicators"] == 0
    assert time.monotonic() - began < 40


def test_a_server_that_dies_and_comes_back(start_on: Start) -> None:
    one, two = start_on(0, 1), start_on(1, 2)
    ids = _begin([one, two], engines.PAIR, engines.CONTRACT_TABLE)
    hosts.wait_all([one, two], ids)
    two.kill()
    until(lambda: one.do(nodes.link_error, ids[0]) is not None)
    one.do(nodes.unlink, ids[0])
    assert one.do(engines.live)["communicators"] == 0
    two = start_on(1, 2)
    hosts.wait_all([one, two], _begin([one, two], engines.PAIR, engines.CONTRACT_TABLE))
    _check_pull(two, 2, one, 1)


def test_three_servers_of_which_one_comes_late(start_on: Start) -> None:
    mapping, table = {1: 0, 2: 1, 3: 2}, hccl_sim.table(3)
    members = [start_on(number, number + 1) for number in range(3)]
    ids = _begin(members[:2], mapping, table)
    time.sleep(3)
    ids += _begin(members[2:], mapping, table)
    hosts.wait_all(members, ids)
    _check_pull(members[2], 3, members[0], 1)
    _check_pull(members[0], 1, members[1], 2)


def test_a_server_that_dies_while_they_swap_what_they_are_can_come_back(start_on: Start) -> None:
    mapping, table = {1: 0, 2: 1, 3: 2}, hccl_sim.table(3)
    members = [start_on(number, number + 1) for number in range(3)]
    members[2].do(_delay, "HcclExchangeMemDesc", 60_000)
    ids = _begin(members, mapping, table)
    until(lambda: members[2].do(_calls, "HcclExchangeMemDesc") > 0)
    members[2].kill()
    members[2] = start_on(2, 3)
    ids[2:] = _begin(members[2:], mapping, table)
    hosts.wait_all(members, ids)
    _check_pull(members[2], 3, members[0], 1)
    _check_pull(members[1], 2, members[2], 3)
    for node in members:  # that with the server that died may go later
        until(lambda node=node: node.do(engines.live)["communicators"] == 1)  # type: ignore[misc]


def _delay(here: Here, symbol: str, ms: int) -> None:
    here.any["framework"].sim.fault(symbol, ms=ms)


def _calls(here: Here, symbol: str) -> int:
    calls: int = here.any["framework"].sim.calls(symbol)
    return calls


# -- links by address ------------------------------------------------------------------------------


def _resource(cluster: int) -> str:
    device = {"device_id": "0", "device_ip": f"192.168.1.{cluster}"}
    server = {"server_id": f"server-{cluster}", "device": [device]}
    return json.dumps({"version": "1.0", "server_list": [server]})


def test_clusters_of_two_servers_link_by_address(start_on: Start, net: Network) -> None:
    address = net.hosts[0].ipv4
    server = start_on(0, 1, local_comm_res=_resource(1), listen_ip_info=f"{address}:{PORT}")
    client = start_on(1, 2, local_comm_res=_resource(2))
    linked = client.do(nodes.link_clusters, [(1, PORT)], 20_000, address)
    assert linked == ("LLM_SUCCESS", ["LLM_SUCCESS"]), client.do(nodes.log_of, "ERROR")
    _check_pull(server, 1, client, 2)
    _check_pull(client, 2, server, 1)
    ended = client.do(nodes.unlink_clusters, [(1, PORT)], 10_000, False)
    assert ended == ("LLM_SUCCESS", ["LLM_SUCCESS"])

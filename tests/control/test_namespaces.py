"""Engines in network namespaces that share a runtime directory: an address means one engine in each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from datadist import BlocksCacheKey
from tests import hosts, nodes
from tests.hosts import Network
from tests.nodes import Node

pytestmark = hosts.needed

Start = Callable[..., Node]
PORT = 26710
OK = ("LLM_SUCCESS", ["LLM_SUCCESS"])


def _init(here: nodes.Here, cluster: int, settings: dict[str, Any]) -> None:
    nodes.init(here, cluster, local_comm_res="", **settings)


@pytest.fixture
def start_in(net: Network, runtime_dir: Path) -> Iterator[Start]:
    """Start a node with shm in a network namespace; all share one runtime directory."""
    started = ExitStack()

    def start(number: int, cluster: int, **settings: Any) -> Node:
        node = Node({"DATADIST_RUNTIME_DIR": str(runtime_dir)})
        started.callback(node.close)
        node.do(hosts.enter, net.hosts[number].namespace)
        node.do(_init, cluster, settings)
        node.do(nodes.make, "blocks", "blocks", [4, 64], 2, BlocksCacheKey(cluster, 0))
        node.do(nodes.fill, "blocks", cluster * 10 + number)
        return node

    with started:
        yield start


def _link(node: Node, cluster: int, address: str) -> Any:
    return node.do(nodes.link_clusters, [(cluster, PORT)], 30_000, address)


def _pulled(node: Node, cluster: int) -> int:
    node.do(nodes.pull_blocks, BlocksCacheKey(cluster, 0), "blocks", [1], [2])
    return int(node.do(nodes.read, "blocks")[0][2][0])


def _block(server: Node) -> int:
    return int(server.do(nodes.read, "blocks")[0][1][0])


@pytest.mark.parametrize(
    ("listen", "dial"),
    [("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "own address")],
)
def test_each_client_gets_the_engine_of_its_own_namespace(
    start_in: Start, net: Network, listen: str, dial: str
) -> None:
    servers = [start_in(n, 1, listen_ip_info=f"{listen}:{PORT}") for n in (0, 1)]
    assert _block(servers[0]) != _block(servers[1])
    for number in (1, 0):
        client = start_in(number, 2)
        address = net.hosts[number].ipv4 if dial == "own address" else dial
        assert _link(client, 1, address) == OK
        assert _pulled(client, 1) == _block(servers[number])
        client.do(nodes.finalize)


def test_an_address_of_another_namespace_is_found_where_one_engine_has_it(
    start_in: Start, net: Network
) -> None:
    server = start_in(0, 1, listen_ip_info=f"{net.hosts[0].ipv4}:{PORT}")
    start_in(1, 3, listen_ip_info=f"{net.hosts[1].ipv4}:{PORT}")
    client = start_in(2, 2)
    assert _link(client, 1, net.hosts[0].ipv4) == OK
    assert _pulled(client, 1) == _block(server)


def test_an_address_that_two_foreign_namespaces_have_is_refused(
    start_in: Start, net: Network
) -> None:
    net.hosts[0].run("ip", "address", "add", "10.99.0.9/32", "dev", "lo")
    net.hosts[1].run("ip", "address", "add", "10.99.0.9/32", "dev", "lo")
    for number in (0, 1):
        start_in(number, 1 + number, listen_ip_info=f"10.99.0.9:{PORT}")
    client = start_in(2, 5)
    assert _link(client, 1, "10.99.0.9")[0] == "LLM_LINK_FAILED"
    assert "in different network namespaces" in client.do(nodes.log_of, "ERROR")[-1]


def test_a_loopback_address_never_means_another_namespace(start_in: Start) -> None:
    start_in(0, 1, listen_ip_info=f"127.0.0.1:{PORT}")
    client = start_in(1, 2)
    assert _link(client, 1, "127.0.0.1")[0] == "LLM_LINK_FAILED"
    line = client.do(nodes.log_of, "ERROR")[-1]
    assert "cluster 1 listens at" in line
    assert "in another network namespace" in line


def test_the_name_of_one_goes_without_the_other(start_in: Start) -> None:
    first, second = (start_in(n, 1, listen_ip_info=f"0.0.0.0:{PORT}") for n in (0, 1))
    first.do(nodes.finalize)
    client = start_in(1, 2)
    assert _link(client, 1, "127.0.0.1") == OK
    assert _pulled(client, 1) == _block(second)


@pytest.mark.parametrize("address", ["10.20.30.40", "224.0.0.1", "255.255.255.255"])
@pytest.mark.parametrize("nonlocal_bind", ["1"])
def test_an_address_that_nobody_has_means_no_listener(
    start_in: Start, net: Network, address: str, nonlocal_bind: str
) -> None:
    net.hosts[0].run("sysctl", "-qw", f"net.ipv4.ip_nonlocal_bind={nonlocal_bind}")
    start_in(0, 1, listen_ip_info=f"0.0.0.0:{PORT}")
    client = start_in(0, 2)
    assert _link(client, 1, address)[0] == "LLM_LINK_FAILED"
    assert _link(client, 1, "127.0.0.1") == OK

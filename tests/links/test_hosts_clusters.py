"""Links by address between hosts: real processes in network namespaces on a virtual switch."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datadist import BlocksCacheKey
from tests import hosts, nodes
from tests.hosts import Network
from tests.nodes import Node, RemoteError

pytestmark = hosts.needed

Start = Callable[..., Node]
OK = ("LLM_SUCCESS", ["LLM_SUCCESS"])
FAILED = ("LLM_LINK_FAILED", ["LLM_LINK_FAILED"])
PORT = 26700


@pytest.fixture
def serve(start_on: Start, net: Network) -> Start:
    """Start a node that listens at its host's address, or at another one."""

    def start(number: int, cluster: int, listen: str | None = None, **options: object) -> Node:
        where = f"{listen or net.hosts[number].ipv4}:{PORT}"
        return start_on(number, cluster, listen_ip_info=where, local_comm_res="", **options)

    return start


@pytest.fixture
def client_on(start_on: Start) -> Start:
    """Start a node that only dials."""

    def start(number: int, cluster: int, **options: object) -> Node:
        return start_on(number, cluster, local_comm_res="", **options)

    return start


def _link(node: Node, cluster: int, address: str, timeout: int = 30_000) -> Any:
    return node.do(nodes.link_clusters, [(cluster, PORT)], timeout, address)


def _unlink(node: Node, cluster: int, force: bool = False) -> Any:
    return node.do(nodes.unlink_clusters, [(cluster, PORT)], 30_000, force)


def _last_error(node: Node) -> str:
    return str(node.do(nodes.log_of, "ERROR")[-1])


def test_a_link_works_in_both_directions_and_ends(
    serve: Start, client_on: Start, net: Network
) -> None:
    server, client, address = serve(0, 1), client_on(1, 2), net.hosts[0].ipv4
    for _ in range(5):
        assert _link(client, 1, address) == OK
        hosts.check_pull(server, 1, client)
        hosts.check_pull(client, 2, server)
        assert _link(client, 1, address)[0] == "LLM_ALREADY_LINK"
        assert _unlink(client, 1) == OK
        with pytest.raises(RemoteError) as error:
            server.do(nodes.pull_blocks, BlocksCacheKey(2, 0), "from 2", [1], [1])
        assert error.value.status == "LLM_NOT_YET_LINK"
    assert not [w for w in client.do(nodes.log_of, "WARNING") if "linked already" not in w]
    assert not server.do(nodes.log_of, "WARNING")


def _listen_address(here: nodes.Here) -> tuple[str, int] | None:
    return here.live.listen_address


def test_port_0_is_a_free_one(start_on: Start, client_on: Start, net: Network) -> None:
    address = net.hosts[0].ipv4
    server = start_on(0, 1, listen_ip_info=f"{address}:0", local_comm_res="")
    client = client_on(1, 2)
    ip, port = server.do(_listen_address)
    assert (ip, port != 0) == (address, True)
    for _ in range(2):
        assert client.do(nodes.link_clusters, [(1, port)], 30_000, address) == OK
        hosts.check_pull(server, 1, client)
        assert client.do(nodes.unlink_clusters, [(1, port)], 30_000, False) == OK


def test_two_that_link_with_each_other_at_once(serve: Start, net: Network) -> None:
    first, second = serve(0, 1), serve(1, 2)
    ips = [host.ipv4 for host in net.hosts]
    for _ in range(10):
        first.begin(nodes.link_clusters, [(2, PORT)], 30_000, ips[1])
        second.begin(nodes.link_clusters, [(1, PORT)], 30_000, ips[0])
        assert (first.result(), second.result()) == (OK, OK)
        hosts.check_pull(first, 1, second)
        hosts.check_pull(second, 2, first)
        first.begin(nodes.unlink_clusters, [(2,)], 30_000, True)
        second.begin(nodes.unlink_clusters, [(1,)], 30_000, True)
        assert (first.result(), second.result()) == (OK, OK)


def test_one_server_on_all_its_addresses_many_clients(
    serve: Start, client_on: Start, net: Network
) -> None:
    server = serve(0, 1, "0.0.0.0")
    clients = {2: client_on(1, 2), 3: client_on(2, 3), 4: client_on(0, 4)}
    for client in clients.values():
        client.begin(nodes.link_clusters, [(1, PORT)], 30_000, net.hosts[0].ipv4)
    assert [client.result() for client in clients.values()] == [OK] * 3
    for cluster, client in clients.items():
        hosts.check_pull(server, 1, client)
        hosts.check_pull(client, cluster, server)
    near = "the client on the server's host needs no network"
    assert hosts.connections_come_to(net.hosts[0], 2), near


def test_a_restarted_server_is_linked_again(serve: Start, client_on: Start, net: Network) -> None:
    server, client, address = serve(0, 1), client_on(1, 2), net.hosts[0].ipv4
    assert _link(client, 1, address) == OK
    server.kill()
    assert _unlink(client, 1)[0] == "LLM_UNLINK_FAILED"
    assert _unlink(client, 1, force=True) == OK
    assert _link(client, 1, address) == FAILED
    assert "connection refused" in _last_error(client)
    server = serve(0, 1)
    assert _link(client, 1, address) == OK
    server.kill()
    server = serve(0, 1)
    assert _link(client, 1, address) == OK, "a broken link needs no unlink"
    hosts.check_pull(server, 1, client)


@pytest.mark.parametrize("force", [False, True])
def test_the_server_unlinks(serve: Start, client_on: Start, net: Network, force: bool) -> None:
    server, client, address = serve(0, 1), client_on(1, 2), net.hosts[0].ipv4
    assert _link(client, 1, address) == OK
    hosts.check_pull(server, 1, client)
    assert _unlink(server, 2, force) == OK
    assert _link(client, 1, address) == OK
    hosts.check_pull(server, 1, client)


@pytest.mark.parametrize("key", [None, "another key of sixteen bytes"])
def test_a_wrong_key_lets_nobody_in(
    serve: Start, client_on: Start, net: Network, key: str | None
) -> None:
    server, client = serve(0, 1), client_on(1, 2, key=key)
    assert _link(client, 1, net.hosts[0].ipv4) == FAILED
    assert "DATADIST_AUTH_KEY" in _last_error(client)
    if key is not None:
        nodes.said(server, "WARNING", net.hosts[1].ipv4, "DATADIST_AUTH_KEY")
        assert len(server.do(nodes.log_of, "WARNING")) == 1


def test_a_server_without_a_key_is_there_for_its_host(
    serve: Start, client_on: Start, net: Network
) -> None:
    server = serve(0, 1, key=None)
    (warning,) = server.do(nodes.log_of, "WARNING")
    assert "DATADIST_AUTH_KEY" in warning
    assert not net.hosts[0].run("ss", "-Hltn"), "nothing is open to the network"
    far, near = client_on(1, 2), client_on(0, 3, key=None)
    assert _link(far, 1, net.hosts[0].ipv4) == FAILED
    assert "connection refused" in _last_error(far)
    assert _link(near, 1, net.hosts[0].ipv4) == OK


def test_loopback_needs_no_key(serve: Start) -> None:
    assert not serve(0, 1, "127.0.0.1", key=None).do(nodes.log_of, "WARNING")


def test_packets_that_vanish(serve: Start, client_on: Start, net: Network) -> None:
    server, client, address = serve(0, 1), client_on(1, 2), net.hosts[0].ipv4
    net.hosts[0].run("ip", "route", "add", "blackhole", f"{net.hosts[1].ipv4}/32")
    began = time.monotonic()
    assert _link(client, 1, address, 2000)[0] == "LLM_TIMEOUT"
    assert 1.9 < time.monotonic() - began < 60, "the kernel gives up after two minutes"
    assert "firewall" in _last_error(client)
    net.hosts[0].run("ip", "route", "del", "blackhole", f"{net.hosts[1].ipv4}/32")
    server.pause()
    assert _link(client, 1, address, 900)[0] == "LLM_TIMEOUT"
    server.resume()
    assert _link(client, 1, address) == OK
    hosts.check_pull(server, 1, client)


def test_ends_that_do_not_fit_are_told_why(
    serve: Start, client_on: Start, start_on: Start, net: Network
) -> None:
    address = net.hosts[0].ipv4
    serve(0, 1)
    same_id = client_on(1, 1)
    assert _link(same_id, 1, address)[0] == "LLM_PARAM_INVALID"
    assert "own cluster id 1" in _last_error(same_id)
    other_mode = start_on(1, 2)
    assert _link(other_mode, 1, address)[0] == "LLM_PARAM_INVALID"
    assert "enable_remote_cache_accessible" in _last_error(other_mode)
    client = client_on(1, 3)
    assert _link(client, 9, address) == OK
    assert "listens cluster 1" in client.do(nodes.log_of, "WARNING")[-1]


def test_processes_of_one_host_leave_the_network(
    serve: Start, client_on: Start, net: Network, tmp_path: Path
) -> None:
    server, client = serve(0, 1), client_on(0, 2)
    (name,) = (tmp_path / "run0").glob(f"*@{net.hosts[0].ipv4}:{PORT}")
    name.unlink()  # or it would not even dial
    assert _link(client, 1, net.hosts[0].ipv4) == OK
    hosts.check_pull(server, 1, client)
    assert hosts.connections_come_to(net.hosts[0], 0), "they talk over the runtime directory"


def test_finalize_ends_a_call(client_on: Start, net: Network) -> None:
    client = client_on(1, 2)
    net.hosts[0].run("ip", "route", "add", "blackhole", f"{net.hosts[1].ipv4}/32")
    client.do(_call_in_background, net.hosts[0].ipv4)
    assert client.do(_finalize_and_collect) == FAILED


def _call_in_background(here: nodes.Here, address: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor()
    here.any["call"] = pool.submit(nodes.link_clusters, here, [(1, PORT)], 130_000, address)
    engine = here.live._engine
    assert engine is not None
    while not engine._clusters._calls:  # it has begun
        assert not here.any["call"].done(), here.any["call"].result()
        time.sleep(0.001)


def _finalize_and_collect(here: nodes.Here) -> object:
    here.live.finalize()
    return here.any["call"].result(nodes.SECONDS / 2)

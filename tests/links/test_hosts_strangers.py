"""Links over the network beside a crowd of strangers: real engines, TCP over loopback, 300 addresses.

Each engine has a runtime directory of its own, so that they meet over the network only.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from datadist.control.hostport import HostPort
from tests import hosts, netcopy, nodes
from tests.crowd import KINDS, Connections
from tests.nodes import Here, Node

HOSTS, EACH = 300, 4
OK = ("LLM_SUCCESS", ["LLM_SUCCESS"])
Start = Callable[..., Node]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start an engine on the test's transport."""
    netcopy.publish(tmp_path)
    started = itertools.count()

    def start(cluster: int | None = None, **settings: Any) -> Node:
        run = tmp_path / f"run{next(started)}"
        run.mkdir(mode=0o700)
        environ = {"DATADIST_RUNTIME_DIR": str(run), "DATADIST_AUTH_KEY": hosts.KEY}
        node = Node(environ)
        stack.callback(node.close)
        node.do(netcopy.install, str(tmp_path))
        if cluster is not None:
            node.do(_init, cluster, settings)
        return node

    with ExitStack() as stack:
        yield start


def _init(here: Here, cluster: int, settings: dict[str, Any]) -> None:
    hosts.init(here, cluster, **settings)


def _crowd(here: Here, place: HostPort, kinds: tuple[str, ...]) -> None:
    here.any["crowd"] = Connections(place, HOSTS, EACH, kinds)


def _settled(here: Here) -> None:
    assert here.any["crowd"].settled.wait(nodes.SECONDS)


@pytest.mark.parametrize("kinds", [(kind,) for kind in KINDS[:3]] + [KINDS[:3]])
def test_link_clusters_works_at_its_first_call(
    start: Start, free_ports: Callable[[int], list[int]], kinds: tuple[str, ...]
) -> None:
    (port,) = free_ports(1)
    server = start(1, listen_ip_info=f"127.0.0.1:{port}", local_comm_res="")
    client = start(2, local_comm_res="")
    strangers = start()
    strangers.do(_crowd, HostPort("127.0.0.1", port), kinds)
    strangers.do(_settled)
    for _ in range(5):
        assert client.do(nodes.link_clusters, [(1, port)]) == OK
        hosts.check_pull(server, 1, client)
        assert client.do(nodes.unlink_clusters, [(1, port)]) == OK
    refused = [line for line in server.do(nodes.log_of, "WARNING") if "refused" in line]
    assert 1 <= len(refused) < 300


def test_a_domain_is_formed_at_the_first_call(
    start: Start, free_ports: Callable[[int], list[int]]
) -> None:
    """Strangers know the protocol, and come while rank 0 listens; the table names rank 1's address."""
    (port,) = free_ports(1)
    table = hosts.table(["127.0.0.1", "127.0.0.1"], host_port=str(port))
    first, second, strangers = start(1, link_total_time=120), start(2, link_total_time=120), start()
    ours = first.do(nodes.link, "pair", {1: 0, 2: 1}, table)
    strangers.do(_crowd, HostPort("127.0.0.1", port), KINDS)
    strangers.do(_settled)
    began = time.monotonic()
    theirs = second.do(nodes.link, "pair", {1: 0, 2: 1}, table)
    hosts.wait_all([first, second], [ours, theirs])
    assert time.monotonic() - began < 60, "the limit of link is two minutes"
    hosts.check_pull(first, 1, second)

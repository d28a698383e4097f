"""Links between hosts, over TCP: real processes in network namespaces on a virtual switch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datadist import BlocksCacheKey
from tests import hosts, netcopy, nodes
from tests.hosts import KEY, Network
from tests.nodes import Node

REASON = hosts.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

PAIR = {1: 0, 2: 1}
Start = Callable[..., Node]


@pytest.fixture
def net() -> Iterator[Network]:
    """Three hosts."""
    with hosts.network(3) as network:
        yield network


@pytest.fixture
def start_on(net: Network, tmp_path: Path) -> Iterator[Start]:
    """Start a node on a host; each host has a runtime directory of its own."""
    netcopy.publish(tmp_path)
    started: list[Node] = []

    def start(number: int, cluster: int, *, key: str | None = KEY, **options: Any) -> Node:
        run = tmp_path / f"run{number}"
        run.mkdir(mode=0o700, exist_ok=True)
        environ = {"DATADIST_RUNTIME_DIR": str(run), **options.pop("environ", {})}
        if key is not None:
            environ["DATADIST_AUTH_KEY"] = key
        node = hosts.start(net.hosts[number], environ, str(tmp_path))
        started.append(node)
        node.do(_init, cluster, options)
        return node

    yield start
    for node in started:
        node.close()


def _init(here: nodes.Here, cluster: int, options: dict[str, Any]) -> None:
    hosts.init(here, cluster, **options)


def _pull(here: nodes.Here, key: Any, label: str, src: list[int], dst: list[int]) -> None:
    nodes.pull_blocks(here, key, label, src, dst)


def _check_pull(owner: Node, cluster: int, puller: Node) -> None:
    """Pull blocks of every tensor and compare all bytes, also those that must not change."""
    label = f"from {cluster}"
    owner.do(nodes.make, label, "blocks", [8, 64], 4, BlocksCacheKey(cluster, 0))
    owner.do(nodes.fill, label, cluster)
    puller.do(nodes.make, label, "blocks", [8, 64])
    puller.do(_pull, BlocksCacheKey(cluster, 0), label, [1, 2, 5], [0, 3, 4])
    theirs, ours = owner.do(nodes.read, label), puller.do(nodes.read, label)
    for there, here in zip(theirs, ours, strict=True):
        expected = np.zeros_like(here)
        expected[[0, 3, 4]] = there[[1, 2, 5]]
        np.testing.assert_array_equal(here, expected)


def _link_all(members: list[Node], name: str, mapping: dict[int, int], table: str) -> list[int]:
    ids = [node.do(nodes.link, name, mapping, table) for node in members]
    for node, comm_id in zip(members, ids, strict=True):
        node.do(nodes.wait, comm_id)
    return ids


@pytest.mark.parametrize("version", [4, 6])
def test_two_hosts_link_and_pull(start_on: Start, net: Network, version: int) -> None:
    addresses = [h.ipv4 if version == 4 else h.ipv6 for h in net.hosts[:2]]
    one, two = start_on(0, 1), start_on(1, 2)
    ids = _link_all([one, two], "pair", PAIR, hosts.table(addresses))
    _check_pull(one, 1, two)
    _check_pull(two, 2, one)
    two.do(nodes.unlink, ids[1])
    one.do(nodes.unlink, ids[0])
    assert not one.do(nodes.log_of, "WARNING")

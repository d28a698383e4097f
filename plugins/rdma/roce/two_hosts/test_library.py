"""The whole library between two hosts: the main flow, links by address, and what the network does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from roce import library
from roce.nodes import AnyNode, RemoteNode, lab, start_here, wait_for_other

from datadist import BlocksCacheKey, CacheKeyByIdAndIndex, RegisterMemStatus
from tests import nodes
from tests.links.test_link import documented_example
from tests.nodes import RemoteError, pattern
from tests.transfers.test_layerwise import test_one_sided_blocks, test_two_sided_blocks
from tests.transfers.test_pull import (
    test_all_ordered_pairs_of_four_clusters_and_two_domains,
    test_blocks_to_blocks,
    test_layer_ranges_move_these_tensors_only,
)
from tests.transfers.test_push import test_a_slot_is_pushed, test_blocks_are_pushed
from tests.upstream import CONTRACT_TABLE

__all__ = [
    "test_a_slot_is_pushed",
    "test_all_ordered_pairs_of_four_clusters_and_two_domains",
    "test_blocks_are_pushed",
    "test_blocks_to_blocks",
    "test_layer_ranges_move_these_tensors_only",
    "test_one_sided_blocks",
    "test_two_sided_blocks",
]

HOSTS = ("10.99.0.1", "10.99.0.2")
PAIR = {1: 0, 2: 1}
SECRET = "0123456789abcdef0123456789abcdef"
PATIENCE = 0.47
SLACK = 8.0
"""For emulated machines on a busy host."""
EXAMPLE_SECONDS = 120.0
"""Pinning the pool of the example, 1 GiB, takes half a minute in an emulated machine."""

Start = Callable[..., AnyNode]
Record = Callable[[str, object], None]


@pytest.fixture
def start_node(tmp_path: Path) -> Iterator[Start]:
    """Start a node, those with an even cluster id in the other machine."""
    started = ExitStack()
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)

    def start(cluster: int, **settings: Any) -> AnyNode:
        environ = {
            "DATADIST_AUTH_KEY": SECRET,
            "DATADIST_RENDEZVOUS": f"{HOSTS[0]}:7600",
            "DATADIST_PEER_TIMEOUT": "30",
        }
        if cluster % 2:
            node: AnyNode = start_here({**environ, "DATADIST_RUNTIME_DIR": str(folder)})
        else:
            node = RemoteNode(environ)
        started.callback(node.close)
        pool = settings.pop("pool", 2 * nodes.MIB)
        settings.setdefault("transfer_backend", "rdma")
        node.do(nodes.init, cluster, pool, **settings)
        return node

    with started:
        yield start


def _table(**of_ranks: list[str]) -> str:
    servers = []
    for rank, host in enumerate(HOSTS):
        device = {"device_id": "0", "rank_id": str(rank)}
        device.update({name: values[rank] for name, values in of_ranks.items()})
        servers.append({"server_id": host, "device": [device]})
    return json.dumps(
        {"version": "1.0", "status": "completed", "server_count": "2", "server_list": servers}
    )


def _link(one: AnyNode, two: AnyNode, name: str, table: str) -> float:
    begun = time.monotonic()
    ids = [node.do(nodes.link, name, PAIR, table) for node in (one, two)]
    for node, comm_id in zip((one, two), ids, strict=True):
        node.do(nodes.wait, comm_id)
    return time.monotonic() - begun


def test_the_documented_example(tmp_path: Path) -> None:
    """As printed, with the hosts' addresses in the table's placeholders, and nothing chosen."""
    table = CONTRACT_TABLE
    for host in HOSTS:
        table = table.replace("x.x.x.x", host, 1).replace("xxxx", host, 1)
    environ = {"DATADIST_AUTH_KEY": SECRET, "DATADIST_RUNTIME_DIR": "/run/example"}
    members: tuple[AnyNode, AnyNode] = (start_here(environ), RemoteNode(environ))
    prompt, decoder = members
    try:
        for cluster, node in enumerate(members, 1):
            node.begin(documented_example, cluster, table, EXAMPLE_SECONDS)
        for node in members:
            comm_id, status = node.result(2 * EXAMPLE_SECONDS)
            assert comm_id >= 1
            assert status is RegisterMemStatus.OK
            assert any("to rank" in line for line in node.do(nodes.log_of, "INFO link comm1"))
        prompt.do(nodes.make, "src", "cache", [2, 1000], 4)
        prompt.do(nodes.fill, "src", 3)
        decoder.do(nodes.make, "dst", "cache", [2, 1000], 4)
        decoder.do(nodes.pull_cache, CacheKeyByIdAndIndex(1, 1, 1), "dst")
        for tensor, array in enumerate(decoder.do(nodes.read, "dst")):
            assert not array[1:].any()
            np.testing.assert_array_equal(array[0], pattern(3, tensor, (2, 1000))[1])
    finally:
        for node in members:
            node.close()


def test_the_rank_table_chooses_the_adapter(start_node: Start, record_property: Record) -> None:
    one, two = start_node(1), start_node(2)
    ips = ["fd00:99::1", "fd00:99::2"]
    took = _link(one, two, "table", _table(device_ip=ips))
    record_property("two machines, link to OK", f"{took * 1e3:.0f} ms")
    (line,) = [line for line in one.do(nodes.log_of, "INFO") if "to rank 1: rxe0" in line]
    assert f"GID 2 ({ips[0]}) to {ips[1]}, MTU 4096" in line


def test_a_table_with_a_foreign_address_is_refused(start_node: Start) -> None:
    one = start_node(1)
    with pytest.raises(RemoteError, match="device_ip of rank 0") as caught:
        one.do(nodes.link, "foreign", PAIR, _table(device_ip=["10.98.0.1", "10.99.0.2"]))
    assert "10.99.0.1 (rxe0 port 1 GID 1)" in caught.value.text


def test_links_by_address_reach_the_other_host(start_node: Start) -> None:
    client = start_node(1, local_comm_res="")
    server = start_node(2, listen_ip_info=f"{HOSTS[1]}:26001", local_comm_res="")
    server.do(nodes.make, "blocks", "blocks", [8, 100], 4, BlocksCacheKey(2, 0))
    server.do(nodes.fill, "blocks", 2)
    client.do(nodes.make, "blocks", "blocks", [8, 100], 4)
    assert client.do(library.link_cluster, 2, HOSTS[1], 26001) == "LLM_SUCCESS"
    client.do(nodes.pull_blocks, BlocksCacheKey(2, 0), "blocks", [3, 1], [5, 0])
    for tensor, array in enumerate(client.do(nodes.read, "blocks")):
        expected = np.zeros_like(array)
        expected[[5, 0]] = pattern(2, tensor, (8, 100))[[3, 1]]
        np.testing.assert_array_equal(array, expected)


class Pulling:
    """A pull from the other machine that goes on until it is made to fail."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self.puller = start(1, sync_kv_timeout=60_000, pool=8 * nodes.MIB)
        self.puller.do(nodes.make, "dst", "cache", [1, nodes.MIB], 1)
        self.begin_owner()

    def begin_owner(self) -> None:
        """Start the owner and link; the same after its machine was off."""
        self.owner = self._start(2, pool=8 * nodes.MIB)
        self.owner.do(nodes.make, "src", "cache", [1, nodes.MIB], 1)
        self.owner.do(nodes.fill, "src", 5)
        self.link()

    def link(self) -> None:
        """Link the two."""
        _link(self.puller, self.owner, "pulling", _table())

    def fail(self, event: Callable[[], object]) -> tuple[str, str, float]:
        """Pull on, let ``event`` happen; status and text of the failure, and how long it took."""
        self.puller.begin(library.pull_until_it_fails, CacheKeyByIdAndIndex(2, 1, 0), "dst")
        time.sleep(1.5)
        event()
        begun = time.monotonic()
        status, text = self.puller.result()
        return status, text, time.monotonic() - begun

    def check(self) -> None:
        """A pull that succeeds."""
        self.puller.do(nodes.pull_cache, CacheKeyByIdAndIndex(2, 1, 0), "dst")
        (array,) = self.puller.do(nodes.read, "dst")
        np.testing.assert_array_equal(array, pattern(5, 0, array.shape))


def test_a_cut_wire_ends_the_pull_and_a_new_link_works(
    start_node: Start, record_property: Record
) -> None:
    run = Pulling(start_node)
    run.check()
    status, text, took = run.fail(lambda: lab(do="wire", cut=True, loss=0.0))
    lab(do="wire", cut=False, loss=0.0)
    record_property("wire cut in mid-pull", f"{status} after {took:.2f} s")
    assert status in ("LLM_FAILED", "LLM_NOT_YET_LINK"), text
    assert took < PATIENCE * 4 + SLACK
    assert "rank 1 does not answer" in run.puller.do(nodes.link_error, 1)
    run.puller.do(nodes.unlink, 1)
    run.owner.do(nodes.unlink, 1)
    run.link()
    run.check()


def test_power_loss_of_the_owner_and_its_return(start_node: Start, record_property: Record) -> None:
    run = Pulling(start_node)
    status, text, took = run.fail(lambda: lab(do="power_off"))
    record_property("owner's power lost in mid-pull", f"{status} after {took:.2f} s")
    assert status in ("LLM_FAILED", "LLM_NOT_YET_LINK"), text
    assert took < PATIENCE * 4 + SLACK
    assert run.puller.do(nodes.link_error, 1)
    run.puller.do(nodes.unlink, 1)
    lab(do="power_on")
    wait_for_other()
    run.begin_owner()
    run.check()

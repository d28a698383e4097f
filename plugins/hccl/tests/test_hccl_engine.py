"""The documented API on the hccl transport over the simulator; the shm transport runs the same code."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import hccl_sim
import numpy as np
import pytest
from hccl_sim import engines
from numpy.typing import NDArray

from datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    DataType,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    Placement,
    RegisterMemStatus,
)
from tests import nodes
from tests.nodes import Here, Node, RemoteError, pattern
from tests.waiting import until

Start = Callable[..., Node]
MIB = 1 << 20


@pytest.mark.parametrize("backend", ["shm", "hccl"])
def test_the_documented_example(start_node: Start, backend: str) -> None:
    group = [start_node(), start_node()]
    for cluster, node in enumerate(group, 1):
        node.begin(_documented_example, cluster, backend)
    for node in group:
        comm_id, status, used = node.result()
        assert comm_id >= 1
        assert status is RegisterMemStatus.OK
        assert used == backend
    _pull_what_was_allocated(*group)


def _documented_example(
    here: Here, cluster_id: int, backend: str
) -> tuple[int, RegisterMemStatus, str]:
    llm_datadist = LLMDataDist(LLMRole.PROMPT if cluster_id == 1 else LLMRole.DECODER, cluster_id)
    here.engine = llm_datadist
    init_options = {
        "ge.exec.deviceId": "0",
        "llm.MemPoolConfig": '{"memory_size": 67108864}',
    }
    llm_config = LLMConfig()
    llm_config.enable_cache_manager = True
    llm_config.transfer_backend = backend
    init_options.update(llm_config.generate_options())
    llm_datadist.init(init_options)
    here.any["framework"] = engines.Framework(backend)
    comm_id = llm_datadist.link("comm1", {1: 0, 2: 1}, engines.CONTRACT_TABLE)
    status = llm_datadist.query_register_mem_status(comm_id)
    deadline = time.monotonic() + 30
    while status is RegisterMemStatus.PREPARING and time.monotonic() < deadline:
        time.sleep(0.05)
        status = llm_datadist.query_register_mem_status(comm_id)
    assert llm_datadist.backend is not None
    return comm_id, status, llm_datadist.backend


def _pull_what_was_allocated(owner: Node, puller: Node) -> None:
    owner.do(_allocate, "src", [CacheKey(1, 7)], seed=1)
    puller.do(_allocate, "dst", [], seed=2)
    puller.do(nodes.pull_cache, CacheKey(1, 7), "dst", 1)
    expected = [pattern(2, tensor, (2, 100)) for tensor in range(4)]
    for tensor, array in enumerate(expected):
        array[1] = pattern(1, tensor, (2, 100))[0]
    np.testing.assert_array_equal(puller.do(engines.contents, "dst"), expected)
    for node in (owner, puller):
        node.do(nodes.unlink, 1)
        node.do(nodes.finalize)


def _allocate(here: Here, label: str, keys: list[CacheKey], seed: int) -> None:
    desc = CacheDesc(4, [2, 100], DataType.DT_INT32)
    here.caches[label] = here.live.cache_manager.allocate_cache(desc, keys)
    engines.fill(here, label, seed)


# -- paged caches of a framework ------------------------------------------------------------------


def _paged_pair(start_node: Start, backend: str, **settings: Any) -> tuple[Node, Node]:
    one, two = start_node(), start_node()
    for cluster, node in ((1, one), (2, two)):
        node.do(engines.paged_engine, cluster, backend, BlocksCacheKey(cluster, 0), **settings)
    for node in (one, two):
        node.begin(engines.link, engines.CONTRACT_TABLE)
    for node in (one, two):
        node.result()
    return one, two


@pytest.mark.parametrize("backend", ["shm", "hccl"])
def test_paged_pulls(start_node: Start, backend: str) -> None:
    one, two = _paged_pair(start_node, backend)
    two.do(nodes.pull_blocks, BlocksCacheKey(1, 0), "paged", engines.SOURCE, engines.TARGET)
    np.testing.assert_array_equal(two.do(engines.contents, "paged"), engines.moved(1, 2))
    np.testing.assert_array_equal(
        one.do(engines.contents, "paged"),
        [pattern(1, tensor, engines.SHAPE) for tensor in range(4)],
    )


@pytest.mark.parametrize("backend", ["shm", "hccl"])
def test_paged_pushes(start_node: Start, backend: str) -> None:
    one, two = _paged_pair(start_node, backend, local_comm_res="")
    one.do(nodes.push_blocks, BlocksCacheKey(2, 0), "paged", engines.SOURCE, engines.TARGET)
    np.testing.assert_array_equal(two.do(engines.contents, "paged"), engines.moved(1, 2))
    two.do(nodes.pull_blocks, BlocksCacheKey(1, 0), "paged", engines.SOURCE, engines.TARGET)
    np.testing.assert_array_equal(two.do(engines.contents, "paged"), engines.moved(1, 2))


def test_pushes_need_the_right_that_two_sided_mode_does_not_give(start_node: Start) -> None:
    one, _ = _paged_pair(start_node, "hccl")
    with pytest.raises(RemoteError) as caught:
        one.do(nodes.push_blocks, BlocksCacheKey(2, 0), "paged", engines.SOURCE, engines.TARGET)
    assert caught.value.status == "LLM_PARAM_INVALID"


# -- copies inside an engine -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["shm", "hccl"])
def test_copies_between_device_and_host(start_node: Start, backend: str) -> None:
    start_node().do(_copies, backend)


def _copies(here: Here, backend: str) -> None:
    host_pool = json.dumps({"memory_size": 4 * MIB})
    nodes.init(here, 1, 4 * MIB, transfer_backend=backend, host_mem_pool_cfg=host_pool)
    manager = here.live.cache_manager
    here.any["framework"] = engines.Framework(backend)
    shape = (8, 100)
    desc = CacheDesc(2, list(shape), DataType.DT_INT32)
    for label, make in (("a", manager.allocate_cache), ("b", manager.allocate_cache)):
        here.caches[label] = make(desc)
    manager.copy_cache(here.caches["b"], here.caches["a"], 0, 0)
    engines.fill(here, "a", 1)
    manager.copy_cache(here.caches["b"], here.caches["a"], 3, 5)
    for tensor, array in enumerate(engines.contents(here, "b")):
        np.testing.assert_array_equal(array[3], pattern(1, tensor, shape)[5])
        assert not array[:3].any()
    here.caches["paged"] = paged = manager.allocate_blocks_cache(desc)
    engines.fill(here, "paged", 2)
    manager.copy_blocks(paged, {0: [1, 2], 2: [3]})
    _assert_rows(engines.contents(here, "paged"), 2, shape, {1: 0, 2: 0, 3: 0})
    on_host = manager.allocate_blocks_cache(
        CacheDesc(2, list(shape), DataType.DT_INT32, Placement.HOST)
    )
    arrays = [np.zeros(shape, np.int32) for _ in range(2)]
    cpu = Cache.create_cpu_cache(
        CacheDesc(2, list(shape), DataType.DT_INT32, Placement.HOST),
        [int(array.ctypes.data) for array in arrays],
    )
    engines.fill(here, "paged", 3)
    for host, views in ((on_host, on_host.numpy()), (cpu, arrays)):
        manager.swap_blocks(paged, host, {4: 6})
        for tensor, view in enumerate(views):
            np.testing.assert_array_equal(view[6], pattern(3, tensor, shape)[4])
        manager.swap_blocks(host, paged, {6: 7})
    _assert_rows(engines.contents(here, "paged"), 3, shape, {7: 4})
    nodes.finalize(here)


def _assert_rows(
    contents: list[NDArray[np.int32]], seed: int, shape: tuple[int, ...], moved: dict[int, int]
) -> None:
    for tensor, array in enumerate(contents):
        expected = pattern(seed, tensor, shape)
        for target, source in moved.items():
            expected[target] = pattern(seed, tensor, shape)[source]
        np.testing.assert_array_equal(array, expected)


def test_memory_of_the_device_has_no_views(start_node: Start) -> None:
    start_node().do(_no_views)


def _no_views(here: Here) -> None:
    nodes.init(here, 1, 4 * MIB, transfer_backend="hccl")
    cache = here.live.cache_manager.allocate_cache(CacheDesc(1, [1, 4], DataType.DT_INT32))
    with pytest.raises(LLMException, match="lies in memory of the device"):
        cache.numpy()


# -- links ---------------------------------------------------------------------------------------------


def test_four_clusters_pull_from_each_other(start_node: Start) -> None:
    mapping = {cluster: cluster - 1 for cluster in range(1, 5)}
    group = [start_node() for _ in mapping]
    table = hccl_sim.table(4)
    for cluster, node in enumerate(group, 1):
        node.do(engines.paged_engine, cluster, "hccl", BlocksCacheKey(cluster, 0))
    for node in group:
        node.begin(_link_all, mapping, table)
    for node in group:
        node.result()
    for cluster, node in enumerate(group, 1):
        for other in mapping.keys() - {cluster}:
            node.do(engines.fill, "paged", 10 + cluster)
            group[other - 1].do(engines.fill, "paged", other)
            node.do(
                nodes.pull_blocks, BlocksCacheKey(other, 0), "paged", engines.SOURCE, engines.TARGET
            )
            np.testing.assert_array_equal(
                node.do(engines.contents, "paged"), engines.moved(other, 10 + cluster)
            )


def _link_all(here: Here, mapping: dict[int, int], table: str) -> None:
    here.live.wait_link(here.live.link("four", mapping, table))


def test_relinking_leaves_nothing_behind(start_node: Start) -> None:
    one, two = _paged_pair(start_node, "hccl")
    for node in (one, two):
        node.do(nodes.unlink, 1)
    before = [node.do(engines.live) for node in (one, two)]
    for number in range(5):
        for node in (one, two):
            node.begin(engines.link, engines.CONTRACT_TABLE, f"again-{number}")
        comm_ids = [node.result() for node in (one, two)]
        two.do(nodes.pull_blocks, BlocksCacheKey(1, 0), "paged", engines.SOURCE, engines.TARGET)
        for node, comm_id in zip((one, two), comm_ids, strict=True):
            node.do(nodes.unlink, comm_id)
    assert [node.do(engines.live) for node in (one, two)] == before
    for node in (one, two):
        assert node.do(_finalize_all) == ""


def _finalize_all(here: Here) -> str:
    """Finalize; what the simulator holds against us."""
    sim = here.any["framework"].sim
    before = sim.live()
    nodes.finalize(here)
    left = sim.live()
    assert left["communicators"] == left["streams"] == left["registrations"] == 0
    assert left["contexts"] == before["contexts"] - 1
    text: str = sim.violations()
    return text


def test_a_peer_that_dies_breaks_the_link_and_can_come_back(start_node: Start) -> None:
    one, two = _paged_pair(start_node, "hccl")
    one.kill()
    with pytest.raises(RemoteError) as caught:
        two.do(_pull_for_long)
    assert caught.value.status in ("LLM_NOT_YET_LINK", "LLM_FAILED")
    two.do(nodes.unlink, 1)
    three = start_node()
    three.do(engines.paged_engine, 1, "hccl", BlocksCacheKey(1, 0))
    three.begin(engines.link, engines.CONTRACT_TABLE)
    two.do(engines.link, engines.CONTRACT_TABLE)
    three.result()
    two.do(nodes.pull_blocks, BlocksCacheKey(1, 0), "paged", engines.SOURCE, engines.TARGET)


def _pull_for_long(here: Here) -> None:
    for _ in range(100):
        nodes.pull_blocks(here, BlocksCacheKey(1, 0), "paged", engines.SOURCE, engines.TARGET)
        time.sleep(0.02)


def test_a_peer_that_dies_while_hccl_meets_it_can_come_back(start_node: Start) -> None:
    group = [start_node(), start_node()]
    for cluster, node in enumerate(group, 1):
        node.do(engines.paged_engine, cluster, "hccl", BlocksCacheKey(cluster, 0))
    group[0].do(_delay_meeting, 60_000)
    group[0].begin(engines.link, engines.CONTRACT_TABLE)
    group[1].begin(engines.link, engines.CONTRACT_TABLE)
    time.sleep(2)  # it meets the other one by now, mostly
    group[0].kill()
    again = start_node()
    again.do(engines.paged_engine, 1, "hccl", BlocksCacheKey(1, 0))
    again.do(engines.link, engines.CONTRACT_TABLE)
    group[1].result()
    pull = nodes.pull_blocks, BlocksCacheKey(1, 0), "paged", engines.SOURCE, engines.TARGET
    group[1].do(*pull)
    # that of the attempt with the dead process is gone then, and this one is not
    until(lambda: group[1].do(engines.live)["communicators"] == 1)
    group[1].do(*pull)


def _delay_meeting(here: Here, ms: int) -> None:
    here.any["framework"].sim.fault("HcclCommPrepare", ms=ms)


def test_unlink_while_hccl_meets_the_peers(start_node: Start) -> None:
    group = [start_node(), start_node()]
    for cluster, node in enumerate(group, 1):
        node.do(engines.paged_engine, cluster, "hccl", BlocksCacheKey(cluster, 0))
    group[0].do(_delay_meeting, 60_000)
    for node in group:
        node.do(_stay_inside)
        node.do(_begin_link)
    until(lambda: group[1].do(_meetings) > 0)
    began = time.monotonic()
    group[1].do(nodes.unlink, 1)
    assert time.monotonic() - began < 30, "meeting takes a minute"
    assert group[1].do(engines.live)["communicators"] == 1, "destroyed while HCCL was inside"
    began = time.monotonic()
    group[1].do(nodes.finalize)
    assert time.monotonic() - began < 30, "meeting takes a minute"
    until(lambda: not group[1].do(engines.live)["contexts"])
    left = group[1].do(engines.live)
    assert (left["communicators"], left["contexts"], left["registrations"]) == (0, 0, 0)


def _meetings(here: Here) -> int:
    """How often the library was asked to meet the peers."""
    calls: int = here.any["framework"].sim.calls("HcclCommPrepare")
    return calls


def _stay_inside(here: Here) -> None:
    """Let calls that meet the peers take long from the first one on."""
    from datadist_hccl import communicator

    communicator.FIRST_SLICE_SECONDS = communicator.SLICE_SECONDS


def _begin_link(here: Here) -> None:
    here.live.link("pair", engines.PAIR, engines.CONTRACT_TABLE)


def test_a_transfer_that_takes_too_long(start_node: Start) -> None:
    _, two = _paged_pair(start_node, "hccl", sync_kv_timeout=2000)
    two.do(_stick, True)
    with pytest.raises(RemoteError, match=r"not complete after (2|1\.[5-9])") as caught:
        two.do(nodes.pull_blocks, BlocksCacheKey(1, 0), "paged", engines.SOURCE, engines.TARGET)
    assert caught.value.status == "LLM_TIMEOUT"
    with pytest.raises(RemoteError, match="is still in flight") as caught:
        two.do(nodes.pull_blocks, BlocksCacheKey(1, 0), "paged", engines.SOURCE, engines.TARGET)
    assert caught.value.status == "LLM_TIMEOUT"
    two.do(_stick, False)
    _until_settled(two)
    two.do(_stick, True)
    with pytest.raises(RemoteError, match="not complete after"):
        two.do(nodes.pull_blocks, BlocksCacheKey(1, 0), "paged", engines.SOURCE, engines.TARGET)
    began = time.monotonic()
    two.do(nodes.unlink, 1)
    assert time.monotonic() - began < 30, "what is stuck never ends"


def _until_settled(node: Node) -> None:
    """Pull until the transfer that went on is through: a time limit of 2 s may be short for that."""
    deadline = time.monotonic() + 60
    while True:
        try:
            node.do(
                nodes.pull_blocks, BlocksCacheKey(1, 0), "paged", engines.SOURCE, engines.TARGET
            )
            return
        except RemoteError as error:
            if error.status != "LLM_TIMEOUT" or time.monotonic() > deadline:
                raise


def _stick(here: Here, stuck: bool) -> None:
    here.any["framework"].sim.tasks(stuck=stuck)


def test_ranks_that_disagree_on_the_table(start_node: Start) -> None:
    one, two = start_node(), start_node()
    for cluster, node in ((1, one), (2, two)):
        node.do(engines.paged_engine, cluster, "hccl", None)
    one.begin(engines.link, engines.CONTRACT_TABLE)
    with pytest.raises(RemoteError, match=r"192\.168\.1\.7") as caught:
        two.do(engines.link, engines.CONTRACT_TABLE.replace("192.168.1.8", "192.168.1.7"))
    assert caught.value.status == "LLM_LINK_FAILED"
    with pytest.raises(RemoteError):
        one.result()


def test_one_server_needs_the_variable(start_node: Start) -> None:
    node = start_node()
    node.do(engines.paged_engine, 1, "hccl", None)
    with pytest.raises(RemoteError, match="HCCL_INTRA_ROCE_ENABLE=1") as caught:
        node.do(engines.link, hccl_sim.table(2, 1))
    assert caught.value.status == "LLM_LINK_FAILED"


def test_the_variable_may_be_set_until_the_first_link_and_not_later(start_node: Start) -> None:
    group, table = [start_node() for _ in range(2)], hccl_sim.table(2, 1)
    for cluster, node in enumerate(group, 1):
        node.do(engines.paged_engine, cluster, "hccl", None, device_id=cluster - 1)
        node.do(_set_roce, "1")
    for node in group:
        node.begin(engines.link, table)
    for node in group:
        node.result()
        node.do(nodes.unlink, 1)
        node.do(_set_roce, "0")
    for node in group:
        node.begin(engines.link, table, "again")
    for node in group:
        node.result()
        warnings = node.do(nodes.log_of, "WARNING")
        assert any("HCCL_INTRA_ROCE_ENABLE=0 has no effect" in line for line in warnings)


def _set_roce(_here: Here, value: str) -> None:
    os.environ["HCCL_INTRA_ROCE_ENABLE"] = value


def test_the_misspelled_variable_is_honoured_with_a_warning(start_node: Start) -> None:
    group = [start_node({"hccl_inra_roce_enable": "1"}) for _ in range(2)]
    for cluster, node in enumerate(group, 1):
        node.do(
            engines.paged_engine, cluster, "hccl", BlocksCacheKey(cluster, 0), device_id=cluster - 1
        )
        assert any("HCCL_INTRA_ROCE_ENABLE" in line for line in node.do(nodes.log_of, "WARNING"))
    for node in group:
        node.begin(engines.link, hccl_sim.table(2, 1))
    for node in group:
        node.result()
    group[1].do(nodes.pull_blocks, BlocksCacheKey(1, 0), "paged", engines.SOURCE, engines.TARGET)


def test_placeholders_in_the_table_are_named(start_node: Start) -> None:
    node = start_node()
    node.do(engines.paged_engine, 1, "hccl", None)
    with pytest.raises(RemoteError, match=r"device_ip of rank 0 is 'x\.x\.x\.x'") as caught:
        node.do(engines.link, engines.CONTRACT_TABLE.replace("192.168.1.8", "x.x.x.x"))
    assert caught.value.status == "LLM_LINK_FAILED"


def test_more_device_memory_than_documented_is_refused(start_node: Start) -> None:
    node = start_node()
    node.do(engines.paged_engine, 1, "hccl", None)
    with pytest.raises(RemoteError, match="at most 53687091200 bytes") as caught:
        node.do(_register_much)
    assert caught.value.status == "LLM_PARAM_INVALID"


def _register_much(here: Here) -> None:
    desc = CacheDesc(1, [50, 1 << 28], DataType.DT_INT32)
    here.live.cache_manager.register_cache(desc, [1 << 40])


# -- links by address ------------------------------------------------------------------------------------


def _local_resource(cluster: int) -> str:
    device = {"device_id": "0", "device_ip": f"192.168.1.{cluster}"}
    server = {"server_id": f"10.172.0.{cluster}", "device": [device]}
    return json.dumps({"version": "1.0", "server_list": [server]})


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_clusters_that_meet_by_address_make_a_rank_table(start_node: Start) -> None:
    server, client = start_node(), start_node()
    port = _free_port()
    for cluster, node in ((1, server), (2, client)):
        settings: dict[str, Any] = {"local_comm_res": _local_resource(cluster)}
        if node is server:
            settings["listen_ip_info"] = f"127.0.0.1:{port}"
        node.do(engines.paged_engine, cluster, "hccl", BlocksCacheKey(cluster, 0), **settings)
    assert client.do(nodes.link_clusters, [(1, port)]) == ("LLM_SUCCESS", ["LLM_SUCCESS"])
    client.do(nodes.pull_blocks, BlocksCacheKey(1, 0), "paged", engines.SOURCE, engines.TARGET)
    np.testing.assert_array_equal(client.do(engines.contents, "paged"), engines.moved(1, 2))
    server.do(nodes.push_blocks, BlocksCacheKey(2, 0), "paged", engines.SOURCE, engines.TARGET)
    np.testing.assert_array_equal(client.do(engines.contents, "paged"), engines.moved(1, 2))
    assert client.do(nodes.unlink_clusters, [(1, port)]) == ("LLM_SUCCESS", ["LLM_SUCCESS"])


@pytest.mark.parametrize("soc", ["Ascend910B3", "Ascend910_9391"])
def test_clusters_of_one_machine_find_their_resources_themselves(
    start_node: Start, soc: str
) -> None:
    environ = {"HCCL_INTRA_ROCE_ENABLE": "0"}
    server, client = (start_node(environ, soc=soc) for _ in range(2))
    port = _free_port()
    settings: dict[str, Any] = {"local_comm_res": ""}
    server.do(
        engines.paged_engine,
        1,
        "hccl",
        BlocksCacheKey(1, 0),
        listen_ip_info=f"127.0.0.1:{port}",
        **settings,
    )
    client.do(engines.paged_engine, 2, "hccl", None, device_id=1, **settings)
    assert client.do(nodes.link_clusters, [(1, port)]) == ("LLM_SUCCESS", ["LLM_SUCCESS"])
    client.do(nodes.pull_blocks, BlocksCacheKey(1, 0), "paged", engines.SOURCE, engines.TARGET)
    np.testing.assert_array_equal(client.do(engines.contents, "paged"), engines.moved(1, 2))


def test_a_local_resource_that_cannot_be_used(start_node: Start) -> None:
    server, client = start_node(), start_node()
    port = _free_port()
    text = _local_resource(1)
    server.do(
        engines.paged_engine,
        1,
        "hccl",
        None,
        listen_ip_info=f"127.0.0.1:{port}",
        local_comm_res=text,
    )
    client.do(
        engines.paged_engine, 2, "hccl", None, local_comm_res=text.replace("192.168.1.1", "nowhere")
    )
    assert client.do(nodes.link_clusters, [(1, port)])[1] == ["LLM_LINK_FAILED"]
    log = client.do(nodes.log_of)
    assert any("device_ip is 'nowhere', which is no IP address" in line for line in log)

"""Forming, failing, breaking and leaving communication domains, between real processes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from datadist import CacheKeyByIdAndIndex, RegisterMemStatus
from tests import nodes, torn
from tests.nodes import Node, RemoteError, table_for
from tests.upstream import CONTRACT_TABLE
from tests.waiting import until

PAIR = {1: 0, 2: 1}
Start = Callable[..., Node]


def test_the_documented_example(start_node: Start) -> None:
    first, second = start_node(), start_node()
    first.begin(documented_example, 1)
    second.begin(documented_example, 2)
    for node in (first, second):
        comm_id, status = node.result()
        assert comm_id >= 1
        assert status is RegisterMemStatus.OK


def documented_example(
    here: nodes.Here, cluster_id: int, table: str = CONTRACT_TABLE, seconds: float = 30
) -> tuple[int, RegisterMemStatus]:
    """The program of the documentation, with a table whose placeholders may be filled in."""
    from datadist import LlmConfig, LLMDataDist, LLMRole

    llm_datadist = LLMDataDist(LLMRole.PROMPT if cluster_id == 1 else LLMRole.DECODER, cluster_id)
    here.engine = llm_datadist
    init_options = {
        "ge.exec.deviceId": "0",
        "llm.MemPoolConfig": '{"memory_size": 1073741824}',
    }
    llm_config = LlmConfig()
    llm_config.enable_cache_manager = True
    init_options.update(llm_config.generate_options())
    llm_datadist.init(init_options)
    comm_id = llm_datadist.link("comm1", {1: 0, 2: 1}, table)
    status = llm_datadist.query_register_mem_status(comm_id)
    deadline = time.monotonic() + seconds
    while status is RegisterMemStatus.PREPARING and time.monotonic() < deadline:
        time.sleep(0.05)
        status = llm_datadist.query_register_mem_status(comm_id)
    return comm_id, status


def test_a_cluster_that_never_comes(start_node: Start) -> None:
    mapping = {1: 0, 2: 1, 3: 2}
    one, two = start_node(1, link_total_time=2), start_node(2, link_total_time=2)
    for node in (one, two):
        node.do(nodes.link, "trio", mapping)
    began = time.monotonic()
    for node in (one, two):
        with pytest.raises(RemoteError, match=r"cluster 3 \(rank 2\)") as caught:
            node.do(nodes.wait, 1)
        assert caught.value.status == "LLM_LINK_FAILED"
        assert node.do(nodes.status, 1) is RegisterMemStatus.FAILED
        nodes.said(node, "ERROR", "cluster 3 (rank 2)")
        node.do(nodes.unlink, 1)
    assert time.monotonic() - began < 30, "wait_link waits for as long as the link takes"


@pytest.mark.parametrize("difference", ["table", "mapping"])
def test_ranks_that_disagree_fail_everywhere(start_node: Start, difference: str) -> None:
    one, two = start_node(1), start_node(2)
    table = json.loads(table_for(PAIR))
    if difference == "table":
        table["server_list"][0]["device"][1]["device_id"] = "5"
        one.do(nodes.link, "pair", PAIR)
        two.do(nodes.link, "pair", PAIR, json.dumps(table))
        named = "device_id of rank 1"
    else:
        trio = {1: 0, 2: 1, 3: 2}
        one.do(nodes.link, "pair", PAIR)
        two.do(nodes.link, "pair", trio)
        named = "cluster_rank_info"
    for node in (one, two):
        with pytest.raises(RemoteError, match=named) as caught:
            node.do(nodes.wait, 1, 20_000)
        assert caught.value.status == "LLM_LINK_FAILED"


def test_different_modes_fail_everywhere(start_node: Start) -> None:
    one, two = start_node(1), start_node(2, enable_remote_cache_accessible=True)
    for node in (one, two):
        node.do(nodes.link, "pair", PAIR)
    for node in (one, two):
        with pytest.raises(RemoteError, match="enable_remote_cache_accessible") as caught:
            node.do(nodes.wait, 1, 20_000)
        assert caught.value.status == "LLM_LINK_FAILED"


def test_two_ranks_on_one_device_link_where_devices_are_labels(start_node: Start) -> None:
    one, two = start_node(1), start_node(2)
    table = table_for(PAIR).replace('"device_id": "1"', '"device_id": "0"')
    ids = [node.do(nodes.link, "one device", PAIR, table) for node in (one, two)]
    for node, comm_id in zip((one, two), ids, strict=True):
        node.do(nodes.wait, comm_id)


def test_tables_that_mean_the_same_link(start_node: Start) -> None:
    one, two = start_node(1), start_node(2)
    table = json.loads(table_for(PAIR))
    table["server_list"][0]["device"].reverse()
    text = json.dumps(table, indent=3).replace('"1"', "1")
    one.do(nodes.link, "pair", PAIR)
    two.do(nodes.link, "pair", PAIR, text)
    for node in (one, two):
        node.do(nodes.wait, 1)


@pytest.mark.parametrize("during", ["idle", "pull"])
def test_a_killed_peer_is_reported_and_its_successor_linked(start_node: Start, during: str) -> None:
    owner = start_node(1, pool=64 << 20)
    puller = start_node(2, pool=64 << 20, sync_kv_timeout=30_000)
    nodes.link_pair(owner, puller)
    owner.do(nodes.make, "src", "cache", [1, 8 << 20], 1)
    puller.do(nodes.make, "dst", "cache", [1, 8 << 20], 1)
    owner.do(nodes.fill, "src", 1)
    puller.do(nodes.fill, "dst", 2)
    if during == "pull":
        puller.begin(_pull_until_it_fails)
        time.sleep(0.3)
        owner.kill()
        status, delay = puller.result()
        assert status in ("LLM_FAILED", "LLM_NOT_YET_LINK")
    else:
        owner.kill()
        until(lambda: puller.do(nodes.link_error, 1) is not None)
        status, delay = puller.do(_pull_until_it_fails)
        assert status == "LLM_NOT_YET_LINK"
    assert delay < 15.0, "a pull that is not noticed to be in vain ends after 30 s"
    until(lambda: puller.do(nodes.link_error, 1) is not None)  # the pull may see it first
    assert "cluster 1" in puller.do(nodes.link_error, 1)
    old, new = ([nodes.pattern(seed, 0, (1, 8 << 20))] for seed in (2, 1))
    torn.check_torn(puller.do(nodes.read, "dst"), old, new, "what was pulled")
    puller.do(nodes.unlink, 1)
    successor = start_node(1, pool=64 << 20)
    nodes.link_pair(successor, puller)
    successor.do(nodes.make, "src", "cache", [1, 8 << 20], 1)
    puller.do(nodes.pull_cache, CacheKeyByIdAndIndex(1, 1, 0), "dst")


def _pull_until_it_fails(here: nodes.Here) -> tuple[str, float]:
    """Status of the failure, and how long after the last success it came."""
    from datadist import LLMException

    last = time.monotonic()
    while True:
        try:
            nodes.pull_cache(here, CacheKeyByIdAndIndex(1, 1, 0), "dst")
        except LLMException as error:
            return error.status_code.name, time.monotonic() - last
        last = time.monotonic()


def test_unlink_is_local_and_the_name_can_be_used_again(start_node: Start) -> None:
    one, two = start_node(1), start_node(2)
    two.do(nodes.make, "dst", "cache", [1, 16])
    for _ in range(3):
        first, second = nodes.link_pair(one, two)
        one.do(nodes.unlink, first)
        with pytest.raises(RemoteError) as caught:
            one.do(nodes.status, first)
        assert caught.value.status == "LLM_NOT_YET_LINK"
        assert two.do(nodes.status, second) is RegisterMemStatus.OK
        with pytest.raises(RemoteError) as caught:
            two.do(nodes.pull_cache, CacheKeyByIdAndIndex(1, 1, 0), "dst")
        assert caught.value.status == "LLM_NOT_YET_LINK"
        two.do(nodes.unlink, second)


def test_links_in_opposite_orders_with_absent_peers(start_node: Start) -> None:
    names = [f"link-{number}" for number in range(24)]
    one, two = (start_node(cluster, link_total_time=120) for cluster in (1, 2))
    one.begin(_link_many, [*names, "absent-1", "absent-2"])
    two.do(_link_many, ["absent-3", *reversed(names)])
    one.result()
    for node in (one, two):
        states = node.do(_states, 40.0)
        assert sorted(n for n, s in states.items() if s == "OK") == sorted(names)
        assert {s for n, s in states.items() if n.startswith("absent")} == {"PREPARING"}
        warnings = [line for line in node.do(nodes.log_of, "WARNING") if "more than 16" in line]
        assert len(warnings) == 1


def _link_many(here: nodes.Here, names: list[str]) -> None:
    here.any["ids"] = {name: nodes.link(here, name, PAIR) for name in names}


def _states(here: nodes.Here, seconds: float) -> dict[str, str]:
    deadline = time.monotonic() + seconds
    while True:
        states = {n: nodes.status(here, i).name for n, i in here.any["ids"].items()}
        waiting = [n for n, s in states.items() if s == "PREPARING" and "absent" not in n]
        if not waiting or time.monotonic() > deadline:
            return states
        time.sleep(0.02)


def test_512_domains_under_1024_descriptors(start_node: Start) -> None:
    one, two = start_node(), start_node()
    for cluster, node in ((1, one), (2, two)):
        node.do(_limit_descriptors)
        node.do(nodes.init, cluster, 1 << 30, link_total_time=120)
    before = one.do(_usage)
    names = [f"link-{number}" for number in range(512)]
    began = time.monotonic()
    one.begin(_link_many, names)
    two.do(_link_many, list(reversed(names)))
    one.result()
    for node in (one, two):
        states = set(node.do(_states, 50.0).values())
        assert states == {"OK"}, node.do(nodes.log_of, "ERROR")[-3:]
    seconds, after = time.monotonic() - began, one.do(_usage)
    memory = (after["memory"] - before["memory"]) / 512
    print(f"\n512 domains: {seconds / 512 * 1e3:.1f} ms and {memory / 1024:.1f} KiB each")
    assert after["fds"] < 1024
    with pytest.raises(RemoteError, match="512") as caught:
        one.do(nodes.link, "one too many", PAIR)
    assert caught.value.status == "LLM_PARAM_INVALID"


def _limit_descriptors(_here: nodes.Here) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))


def _usage(_here: nodes.Here) -> dict[str, Any]:
    import threading

    with open("/proc/self/status") as lines:
        own = sum(int(x.split()[1]) for x in lines if x.startswith(("RssAnon", "VmPTE")))
    with open("/proc/self/maps") as maps:
        mappings = [line.split()[-1] for line in maps if "memfd:" in line]
    return {
        "fds": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "mappings": len(mappings),
        "memory": own * 1024,
        "dev_shm": sorted(os.listdir("/dev/shm")),
    }


def test_200_cycles_leave_nothing_behind(start_node: Start) -> None:
    owner, puller = start_node(1), start_node(2)
    owner.do(nodes.make, "src", "cache", [1, 16])
    puller.do(nodes.make, "dst", "cache", [1, 16])
    for node in (owner, puller):
        node.begin(_cycles, 5, node is puller)
    for node in (owner, puller):
        node.result()
    before = [node.do(_usage_of_no_session) for node in (owner, puller)]
    for node in (owner, puller):
        node.begin(_cycles, 200, node is puller)
    for node in (owner, puller):
        node.result()
    for node, most in zip((owner, puller), before, strict=True):
        until(partial(_has_no_more, node, most), what=str(most))


def _has_no_more(node: Node, most: dict[str, Any]) -> bool:
    """What the test has made is gone; files of other processes come and go in /dev/shm."""
    now = node.do(_usage_of_no_session)
    counts = ("fds", "threads", "mappings")
    ours = [name for name in now["dev_shm"] if "datadist" in name]
    return all(now[what] <= most[what] for what in counts) and set(ours) <= set(most["dev_shm"])


def _cycles(here: nodes.Here, count: int, pulls: bool) -> None:
    for _ in range(count):
        comm_id = nodes.link_and_wait(here, "cycle", PAIR)
        if pulls:
            nodes.pull_cache(here, CacheKeyByIdAndIndex(1, 1, 0), "dst")
        else:
            while nodes.link_error(here, comm_id) is None:  # until the puller has unlinked
                time.sleep(0.001)
        nodes.unlink(here, comm_id)


def _usage_of_no_session(here: nodes.Here) -> dict[str, Any]:
    """The usage once the session of the last cycle is closed."""
    engine = here.live._engine
    assert engine is not None
    until(lambda: not engine.views)
    return _usage(here)


def test_peers_cannot_write_the_pool_in_the_default_mode(start_node: Start) -> None:
    owner, puller = start_node(1), start_node(2)
    nodes.link_pair(owner, puller)
    assert puller.do(_writable_peer_mappings) == []
    assert owner.do(_writable_descriptors) == "PermissionError"


def _writable_peer_mappings(here: nodes.Here) -> list[str]:
    """Mappings of a memfd that are writable and not of our own pool."""
    with open("/proc/self/maps") as maps:
        shared = [line.split() for line in maps if "memfd:datadist" in line]
    own = {os.stat(f"/proc/self/fd/{fd}").st_ino for fd in _memfds()}
    assert len(shared) == 2, shared
    return [" ".join(line) for line in shared if "w" in line[1] and int(line[4]) not in own]


def _memfds() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:datadist"):
                found.append(fd)
        except OSError:
            continue
    return found


def _writable_descriptors(_here: nodes.Here) -> str:
    """Even with a new descriptor of the pool nobody can map it for writing any more."""
    import mmap

    outcomes = set()
    for fd in _memfds():  # that of our pool, and those of peers
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        try:
            mmap.mmap(again, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE).close()
        except OSError as error:
            outcomes.add(type(error).__name__)
        else:
            outcomes.add("writable")
        finally:
            os.close(again)
    return ", ".join(sorted(outcomes))


def test_wait_link_times_out_and_reports_what_is_missing(start_node: Start) -> None:
    one = start_node(1)
    one.do(nodes.link, "pair", PAIR)
    with pytest.raises(RemoteError, match=r"cluster 2 \(rank 1\)") as caught:
        one.do(nodes.wait, 1, 100)
    assert caught.value.status == "LLM_TIMEOUT"


def test_a_forked_child_is_refused(start_node: Start) -> None:
    one, two = start_node(1), start_node(2)
    nodes.link_pair(one, two)
    assert "before this process forked" in one.do(_fork_and_query)
    assert one.do(nodes.status, 1) is RegisterMemStatus.OK
    two.do(nodes.make, "dst", "cache", [1, 16])
    one.do(nodes.make, "src", "cache", [1, 16])
    two.do(nodes.pull_cache, CacheKeyByIdAndIndex(1, 1, 0), "dst")


def _fork_and_query(here: nodes.Here) -> str:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            here.live.query_register_mem_status(1)
        except RuntimeError as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with os.fdopen(reading) as pipe:
        return pipe.read()


def test_finalize_and_init_again(start_node: Start) -> None:
    one, two = start_node(1), start_node(2)
    nodes.link_pair(one, two)
    one.do(nodes.finalize)
    one.do(nodes.init, 1)
    two.do(nodes.unlink, 1)
    assert nodes.link_pair(one, two) == (1, 2)

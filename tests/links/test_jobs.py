"""Programs with the same cluster ids, name and table on one host: nobody gets foreign bytes unwarned."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from datadist import CacheKey
from tests import descriptors, nodes
from tests.nodes import Node, RemoteError, pattern

Start = Callable[..., Node]
Ports = Callable[[int], list[int]]
PAIR = {1: 0, 2: 1}
SHAPE = [1, 256]
PROMPT, DECODER = 1, 2


def _begin(here: nodes.Here, cluster: int, seed: int, delay: float) -> str | None:
    """Start one engine of a job and link it; why it may not."""
    time.sleep(delay)
    nodes.init(here, cluster, link_total_time=60)
    nodes.make(here, "cache", "cache", SHAPE, 2, [CacheKey(1, 42)] if cluster == PROMPT else None)
    if cluster == PROMPT:
        nodes.fill(here, "cache", seed)
    try:
        here.any["comm"] = nodes.link(here, "pd", PAIR)
    except Exception as error:
        return f"{error}"
    return None


def _pull(here: nodes.Here) -> list[int]:
    nodes.wait(here, here.any["comm"])
    nodes.pull_cache(here, CacheKey(1, 42), "cache")
    return [int(array[0][0]) for array in here.arrays["cache"]]


def _wait(here: nodes.Here) -> None:
    nodes.wait(here, here.any["comm"])


def _first_values(seed: int) -> list[int]:
    return [int(pattern(seed, tensor, (1, 256))[0][0]) for tensor in range(2)]


def _start_jobs(
    start_node: Start, seed: int, named: bool
) -> tuple[dict[tuple[int, int], Node], dict[tuple[int, int], str | None]]:
    """Prompt and decoder of two jobs, interleaved at random; what each heard at `link`."""
    chance = random.Random(seed)
    members = [(job, cluster) for job in (1, 2) for cluster in (PROMPT, DECODER)]
    chance.shuffle(members)
    started = {}
    for job, cluster in members:
        environ = {"DATADIST_JOB": f"job-{job}"} if named else None
        started[job, cluster] = node = start_node(environ=environ)
        node.begin(_begin, cluster, job, chance.random() * 0.3)
    return started, {member: node.result() for member, node in started.items()}


@pytest.mark.parametrize("seed", range(3))
def test_named_jobs_get_their_own_bytes(start_node: Start, seed: int) -> None:
    started, refusals = _start_jobs(start_node, seed, named=True)
    assert set(refusals.values()) == {None}
    for job in (1, 2):
        assert started[job, DECODER].do(_pull) == _first_values(job)


@pytest.mark.parametrize("seed", range(4))
def test_without_names_duplicates_are_refused_and_those_linked_crosswise_warned(
    start_node: Start, seed: int
) -> None:
    started, refusals = _start_jobs(start_node, seed, named=False)
    for cluster in (PROMPT, DECODER):
        (refused,) = [m for m, why in refusals.items() if why is not None and m[1] == cluster]
        (first,) = [m for m, why in refusals.items() if why is None and m[1] == cluster]
        text = refusals[refused]
        assert text is not None
        assert f"cluster id {cluster} belongs to another live engine" in text
        assert f"pid {started[first].pid}, " in text
        assert "s old" in text
        assert "DATADIST_JOB" in text
    linked = {m[1]: started[m] for m, why in refusals.items() if why is None}
    for node in linked.values():
        node.do(_wait)
        for cluster in (PROMPT, DECODER):
            nodes.said(node, "WARNING", f"cluster id {cluster}", "DATADIST_JOB")


def test_who_links_after_a_refusal_is_warned_as_well(start_node: Start) -> None:
    prompt, duplicate = start_node(1), start_node(1)
    prompt.do(nodes.link, "pd", PAIR)
    with pytest.raises(RemoteError, match="cluster id 1 belongs") as caught:
        duplicate.do(nodes.link, "pd", PAIR)
    assert caught.value.status == "LLM_PARAM_INVALID"
    pid = duplicate.pid
    duplicate.kill()
    decoder = start_node(2)
    decoder.do(nodes.link_and_wait, "pd", PAIR)
    nodes.said(decoder, "WARNING", "was refused", f"pid {pid}")
    assert len([x for x in decoder.do(nodes.log_of, "WARNING") if "was refused" in x]) == 1


def test_a_refused_engine_links_once_the_first_one_has_gone(start_node: Start) -> None:
    first, second, peer = start_node(1), start_node(1), start_node(2)
    first.do(nodes.link, "never", {1: 0, 9: 1})
    with pytest.raises(RemoteError, match="cluster id 1 belongs"):
        second.do(nodes.link, "pair", PAIR)
    first.do(nodes.finalize)
    nodes.link_pair(second, peer)
    assert peer.do(nodes.log_of, "ERROR") == []


def test_a_killed_engine_is_replaced_at_once(start_node: Start) -> None:
    first, peer = start_node(1), start_node(2)
    nodes.link_pair(first, peer)
    first.kill()
    second = start_node(1)
    nodes.link_pair(second, peer, "again")


def test_the_same_engine_links_often_and_after_init_again(start_node: Start) -> None:
    first, peer = start_node(1), start_node(2)
    nodes.link_pair(first, peer)
    nodes.link_pair(first, peer, "second")
    first.do(nodes.finalize)
    first.do(nodes.init, 1)
    nodes.link_pair(first, peer, "third")
    assert [x for x in peer.do(nodes.log_of, "WARNING") if "cluster id" in x] == []


def test_a_refusal_leaves_the_engine_as_it_was(start_node: Start) -> None:
    first, second = start_node(1), start_node(1)
    first.do(nodes.link, "never", {1: 0, 9: 1})
    before = second.do(descriptors.count_in)
    for _ in range(5):
        with pytest.raises(RemoteError, match="cluster id 1 belongs"):
            second.do(nodes.link, "pair", PAIR)
    assert second.do(descriptors.fall_to_in, before)
    assert second.do(_domains) == 0
    nodes.said(first, "WARNING", "was refused")
    warnings = [x for x in first.do(nodes.log_of, "WARNING") if "was refused" in x]
    assert len(warnings) == 1, "each refused engine is told of once"


def test_a_job_with_an_at_sign_is_beside_engines_without_a_job(start_node: Start) -> None:
    start_node(1, {"DATADIST_JOB": "me@host"})
    start_node(1)
    start_node(1, {"DATADIST_JOB": "me@host:1"})


def _domains(here: nodes.Here) -> int:
    return len(here.live.stats()["links"])


def test_a_second_engine_that_takes_the_place_of_a_link_by_address(
    start_node: Start, free_ports: Ports
) -> None:
    (port,) = free_ports(1)
    server = start_node(1, listen_ip_info=f"127.0.0.1:{port}", local_comm_res="")
    first, second = start_node(2, local_comm_res=""), start_node(2, local_comm_res="")
    assert first.do(nodes.link_clusters, [(1, port)])[0] == "LLM_SUCCESS"
    assert second.do(nodes.link_clusters, [(1, port)])[0] == "LLM_SUCCESS"
    line = nodes.said(server, "WARNING", "is replaced by")
    assert f"pid {first.pid}" in line
    assert f"pid {second.pid}" in line
    assert "cluster id 2 names two live engines" in line
    nodes.said(first, "WARNING", "cluster 1 ended its link with this engine", f"pid {second.pid}")
    nodes.said(
        second, "WARNING", "cluster 1 ended for this engine its link with", f"pid {first.pid}"
    )


def test_a_listener_in_another_job_is_not_linked_but_named(
    start_node: Start, free_ports: Ports
) -> None:
    (port,) = free_ports(1)
    start_node(1, {"DATADIST_JOB": "a"}, listen_ip_info=f"127.0.0.1:{port}", local_comm_res="")
    client = start_node(2, {"DATADIST_JOB": "b"}, local_comm_res="")
    assert client.do(nodes.link_clusters, [(1, port)])[0] == "LLM_LINK_FAILED"
    (line,) = client.do(nodes.log_of, "ERROR")
    assert "cluster 1 listens at" in line
    assert "job 'a'" in line


def test_a_name_that_is_none_is_refused_at_init(start_node: Start) -> None:
    node = start_node(environ={"DATADIST_JOB": "a/b"})
    with pytest.raises(RemoteError, match="DATADIST_JOB is 'a/b'") as caught:
        node.do(nodes.init, 1)
    assert caught.value.status == "LLM_PARAM_INVALID"


SUITE = """
import json, multiprocessing, os
import pytest
from datadist import *

TABLE = json.dumps({"version": "1.0", "status": "completed", "server_count": "1", "server_list": [
    {"server_id": "s", "device": [{"device_id": str(r), "rank_id": str(r)} for r in (0, 1)]}]})

def engine(cluster):
    config = LLMConfig()
    config.enable_cache_manager = True
    config.mem_pool_cfg = json.dumps({"memory_size": 1 << 22})
    made = LLMDataDist(LLMRole.MIX, cluster)
    made.init(config.generate_options())
    return made

def prompt(value, pulled):
    with engine(1) as one:
        desc = CacheDesc(2, [1, 512], DataType.DT_INT32)
        cache = one.cache_manager.allocate_cache(desc, [CacheKey(1, 7)])
        for array in cache.numpy():
            array[:] = value
        one.wait_link(one.link("pd", {1: 0, 2: 1}, TABLE))
        pulled.wait(30)

@pytest.mark.parametrize("value", range(20))
def test_a_decoder_gets_the_cache_of_its_prompt(value):
    spawn = multiprocessing.get_context("spawn")
    pulled = spawn.Event()
    process = spawn.Process(target=prompt, args=(value + os.getpid() * 100, pulled))
    process.start()
    try:
        with engine(2) as two:
            cache = two.cache_manager.allocate_cache(CacheDesc(2, [1, 512], DataType.DT_INT32))
            two.wait_link(two.link("pd", {1: 0, 2: 1}, TABLE))
            two.cache_manager.pull_cache(CacheKey(1, 7), cache)
            assert [int(array[0, 0]) for array in cache.numpy()] == [value + os.getpid() * 100] * 2
    finally:
        pulled.set()
        process.join(30)
"""


def test_a_suite_under_xdist_needs_no_configuration(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "test_serving.py").write_text(SUITE)
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST_", "DATADIST_"))
    }
    command = [sys.executable, "-m", "pytest", "-n", "4", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "test_serving.py"],
        cwd=project,
        env={**environ, "DATADIST_RUNTIME_DIR": str(tmp_path / "run")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 passed" in done.stdout
    assert os.listdir(tmp_path / "run") == [], "every job took its place away"

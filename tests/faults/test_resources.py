"""Resources that run out: memory, address space, descriptors, a memory cgroup."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKeyByIdAndIndex,
    DataType,
    LLMDataDist,
    LLMRole,
)
from tests import descriptors, nodes, torn
from tests.faults import scenarios
from tests.nodes import MIB, Node, RemoteError

Start = Callable[..., Node]
PAIR = {1: 0, 2: 1}
LARGE_BLOCKS = 960
USAGES = "memory.usage_in_bytes", "memory.current"
CGROUPS = {"/sys/fs/cgroup/memory": "memory.limit_in_bytes", "/sys/fs/cgroup": "memory.max"}
"""Where groups of either version are made, and how they are limited."""


def _limit_address_space(_here: nodes.Here, room: int) -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + room, resource.RLIM_INFINITY))


def _limit_descriptors(here: nodes.Here, room: int) -> None:
    """Leave so many descriptors; gaps between the open ones are filled."""
    taken = max(int(name) for name in os.listdir("/proc/self/fd"))
    fillers = here.any["fillers"] = []
    while not fillers or fillers[-1] <= taken:
        fillers.append(os.dup(0))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (fillers[-1] + 1 + room, hard))


def _lift(here: nodes.Here, what: int) -> None:
    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (hard, hard))
    for fd in here.any.pop("fillers", ()):
        os.close(fd)


def test_a_pool_beyond_the_address_space(start_node: Start) -> None:
    node = start_node()
    node.do(_init_once)
    before = node.do(descriptors.count_in)
    node.do(_limit_address_space, 128 * MIB)
    for _ in range(3):
        with pytest.raises(RemoteError, match="cannot allocate the DEVICE pool") as error:
            node.do(nodes.init, 1, 512 * MIB)
        assert error.value.status == "LLM_OUT_OF_MEMORY"
    assert node.do(descriptors.fall_to_in, before)
    node.do(nodes.init, 1, 8 * MIB)


def _init_once(here: nodes.Here) -> None:
    """Load what the first init loads."""
    nodes.init(here, 9)
    here.live.finalize()


def test_a_peers_pool_beyond_the_address_space(start_node: Start) -> None:
    owner, we = start_node(1, pool=512 * MIB), start_node(2)
    for node, seed in ((owner, 1), (we, 2)):
        node.do(scenarios.prepare, seed)
    we.do(_limit_address_space, 64 * MIB)
    owner.begin(nodes.link_and_wait, "pair", PAIR)
    for node in (we, owner):
        with pytest.raises(RemoteError, match=r"cannot map the memory|Cannot allocate") as error:
            node.result() if node is owner else node.do(nodes.link_and_wait, "pair", PAIR)
        assert error.value.status == "LLM_LINK_FAILED"
    we.do(_lift, resource.RLIMIT_AS)
    for node in (owner, we):
        node.do(nodes.unlink, 1)
    nodes.link_pair(owner, we, "again")
    assert we.do(scenarios.pull_now)[0] == "OK"
    scenarios.check_moved(we, owner, "mid-pull", whole=True)


def test_init_without_descriptors(start_node: Start) -> None:
    node = start_node()
    node.do(_init_once)
    before = node.do(descriptors.count_in)
    for room in range(40):
        node.do(_limit_descriptors, room)
        try:
            node.do(nodes.init, 1)
        except RemoteError as error:
            assert error.status == "LLM_FAILED", (room, error.text)  # noqa: PT017
            assert "ulimit -n" in error.text or "Too many open files" in error.text  # noqa: PT017
        else:
            break
        finally:
            node.do(_lift, resource.RLIMIT_NOFILE)
        assert node.do(descriptors.fall_to_in, before), room
    assert 0 < room < 39
    node.do(nodes.finalize)
    assert node.do(descriptors.fall_to_in, before)


@pytest.mark.parametrize("room", [0, 1, 2, 3, 4, 6])
def test_a_link_without_descriptors_fails_or_works_and_recovers(
    start_node: Start, room: int
) -> None:
    peer, we = start_node(1, link_total_time=3), start_node(2, link_total_time=3)
    for node, seed in ((peer, 1), (we, 2)):
        node.do(scenarios.prepare, seed)
    we.do(_limit_descriptors, room)
    peer.begin(scenarios.wait_settled, peer.do(nodes.link, "pair", PAIR))
    linked, refusal = [peer, we], None
    try:
        comm_id = we.do(nodes.link, "pair", PAIR)
    except RemoteError as error:
        linked, refusal = [peer], error
    if refusal is None:
        status, _, text = we.do(scenarios.wait_settled, comm_id)
        assert status in ("OK", "FAILED"), text
    else:
        assert refusal.status == "LLM_FAILED"
        assert "cannot claim cluster id 2" in refusal.text
        assert "no descriptor is left" in refusal.text
    assert peer.result()[0] in ("OK", "FAILED")
    we.do(_lift, resource.RLIMIT_NOFILE)
    for node in linked:
        node.do(nodes.unlink, 1)
    for node in (peer, we):
        node.do(scenarios.give_time)
    nodes.link_pair(peer, we, "again")
    assert we.do(scenarios.pull_now)[0] == "OK"
    scenarios.check_moved(we, peer, "mid-pull", whole=True)


# -- memory cgroup ---------------------------------------------------------------------------


def _make_cgroup(parent: Path, limit: str) -> Path:
    """A memory cgroup with a limit of 256 MiB. Raises ``OSError`` where that is not possible."""
    path = parent / f"datadist-test-{os.getpid()}"
    path.mkdir()
    try:
        (path / limit).write_text(str(256 * MIB))
        for swap in path.glob("memory.swap.max"):
            swap.write_text("0")
    except OSError:
        path.rmdir()
        raise
    return path


@pytest.fixture
def cgroup() -> Any:
    """A memory cgroup of its own."""
    problems = []
    for parent, limit in CGROUPS.items():
        try:
            path = _make_cgroup(Path(parent), limit)
            break
        except OSError as error:
            problems.append(str(error))
    else:
        pytest.skip(f"no memory cgroup can be made here: {'; '.join(problems)}")
    yield path
    _remove(path)


def _remove(cgroup: Path) -> None:
    """As soon as its processes have gone."""
    deadline = time.monotonic() + 60
    while True:
        try:
            cgroup.rmdir()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_process_beyond_its_memory_cgroup_is_killed_and_peers_notice(
    start_node: Start, cgroup: Path
) -> None:
    peer, we = start_node(1), start_node(2)
    for node, seed in ((peer, 1), (we, 2)):
        node.do(scenarios.prepare, seed)
    nodes.link_pair(peer, we)
    (cgroup / "cgroup.procs").write_text(str(peer.pid))
    peer.begin(_devour, 512 * MIB)  # refuses nothing: the kernel ends it
    reason = we.do(scenarios.wait_until_broken, 1)[2]
    assert "cluster 1 is gone" in reason
    peer.kill()
    assert peer._process.exitcode == -signal.SIGKILL


def _devour(here: nodes.Here, size: int) -> None:
    here.any["memory"] = b"x" * size


def test_a_peers_pool_costs_no_memory_of_ours(start_node: Start, cgroup: Path) -> None:
    """Right after its init, when its owner is still making its pages; and what is never made."""
    we = start_node(2, pool=MIB)
    (cgroup / "cgroup.procs").write_text(str(we.pid))
    owner = start_node(1, pool=512 * MIB)
    late = start_node()
    late.do(_init_without_pages, 3, 512 * MIB)
    for node in (owner, late):
        node.do(_make_large)
    we.do(nodes.make, "c", "blocks", [1, MIB // 8], 1)
    for node, cluster in ((owner, 1), (late, 3)):
        _link_to(node, we, cluster)
        we.do(_pull_everything, cluster)
    usage = next(p for p in map(cgroup.joinpath, USAGES) if p.exists())
    assert int(usage.read_text()) < 128 * MIB
    we.kill()


def _link_to(owner: Node, we: Node, cluster: int) -> None:
    mapping = {2: 0, 3: 1} if cluster == 3 else PAIR
    owner.begin(nodes.link_and_wait, f"to {cluster}", mapping)
    we.do(nodes.link_and_wait, f"to {cluster}", mapping)
    owner.result()


def _init_without_pages(here: nodes.Here, cluster: int, size: int) -> None:
    here.engine = LLMDataDist(LLMRole.MIX, cluster)
    here.engine.init(
        {
            "llm.EnableCacheManager": "1",
            "llm.TransferBackend": "shm",
            "llm.MemPoolConfig": f'{{"memory_size": {size}, "page_shift": 12}}',
            "datadist.shm.populate": "0",
        }
    )


def _make_large(here: nodes.Here) -> None:
    desc = CacheDesc(1, [LARGE_BLOCKS, MIB // 2], DataType.DT_UINT8)
    here.live.cache_manager.allocate_blocks_cache(desc, BlocksCacheKey(here.live.cluster_id))


def _pull_everything(here: nodes.Here, cluster: int) -> None:
    for block in range(LARGE_BLOCKS):
        here.live.cache_manager.pull_blocks(BlocksCacheKey(cluster), here.caches["c"], [block], [0])


# -- the owner's memory ----------------------------------------------------------------------


def _stats(here: nodes.Here) -> dict[str, int]:
    pool: dict[str, int] = here.live.stats()["pools"]["DEVICE"]
    return pool


def test_memory_that_a_dead_consumer_knew_returns_to_the_pool(start_node: Start) -> None:
    owner, consumer = start_node(1), start_node(2)
    for node, seed in ((owner, 1), (consumer, 2)):
        node.do(scenarios.prepare, seed)
    nodes.link_pair(owner, consumer)
    consumer.pause()
    owner.do(nodes.deallocate, "c")
    held = owner.do(_stats)
    assert held["allocations_returning"] == scenarios.TENSORS
    assert held["pages_used"] > 0
    consumer.kill()
    deadline = time.monotonic() + 30
    while (now := owner.do(_stats))["pages_used"]:
        assert time.monotonic() < deadline, now
        time.sleep(0.01)
    assert now["allocations_returning"] == 0


def test_pulls_of_a_dead_producer_fail_at_once(start_node: Start) -> None:
    owner, consumer = start_node(1), start_node(2, sync_kv_timeout=60_000)
    for node, seed in ((owner, 1), (consumer, 2)):
        node.do(scenarios.prepare, seed)
    nodes.link_pair(owner, consumer)
    owner.kill()
    started = time.monotonic()
    for _ in range(100):  # each would wait for 60 s
        with pytest.raises(RemoteError) as error:
            consumer.do(nodes.pull_cache, CacheKeyByIdAndIndex(1, 1, 0), "c")
        assert error.value.status in ("LLM_NOT_YET_LINK", "LLM_FAILED")
    assert time.monotonic() - started < 30
    ours, theirs = scenarios.original(2), scenarios.original(1)
    pulled = torn.moved(ours, theirs, {0: 0})  # the first one may find out only at its end
    torn.check_torn(consumer.do(nodes.read, "c"), ours, pulled, "ours")

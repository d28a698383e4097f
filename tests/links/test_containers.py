"""What containers have to share to link, pull and push: the rows of the table in docs/operations.md."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from datadist import BlocksCacheKey, CacheDesc, DataType, RegisterMemStatus
from datadist.control import discovery, process, session
from tests import namespaces, nodes, privileges, seccomp
from tests.namespaces import CONTAINER, Contained
from tests.nodes import MIB, Node, RemoteError

pytestmark = namespaces.needed

Start = Callable[..., Node]
SHAPE = [4, 1024]
OTHER_PIDS = "its process is in another pid namespace"
NOT_PIDS = [kind for kind in CONTAINER if kind != "pid"]
PAGEMAP_PRESENT = 1 << 63


@pytest.fixture
def start_contained(runtime_dir: Path) -> Iterator[Start]:
    """Start a node in namespaces of its own, which shares the runtime directory."""
    with ExitStack() as started:

        def start(kinds: Sequence[str] = CONTAINER, proc: bool = True, **environ: str) -> Node:
            node = Contained({"DATADIST_RUNTIME_DIR": str(runtime_dir), **environ}, kinds, proc)
            started.callback(node.close)
            return node

        yield start


def _engine(node: Node, cluster: int, memory: str = "pool", **settings: Any) -> Node:
    node.do(nodes.init, cluster, enable_remote_cache_accessible=True, **settings)
    node.do(nodes.make, "blocks", "blocks", SHAPE, 2, BlocksCacheKey(cluster, 0), memory)
    node.do(nodes.fill, "blocks", cluster)
    return node


def _move(node: Node, other: int) -> None:
    """Pull a block from a cluster, compare it, and push another one there."""
    node.do(nodes.pull_blocks, BlocksCacheKey(other, 0), "blocks", [1], [2])
    assert (node.do(nodes.read, "blocks")[0][2] == nodes.pattern(other, 0, tuple(SHAPE))[1]).all()
    node.do(nodes.push_blocks, BlocksCacheKey(other, 0), "blocks", [0], [3])


def _check_refused(node: Node, other: int, *words: str) -> None:
    """One WARNING of the link has the cause; pulls and pushes fail with it, and again."""
    (warning,) = node.do(nodes.warnings_of)
    for call in (nodes.pull_blocks, nodes.push_blocks, nodes.pull_blocks):
        with pytest.raises(RemoteError) as caught:
            node.do(call, BlocksCacheKey(other, 0), "blocks", [1], [2])
        assert caught.value.status == "LLM_FAILED"
        for word in words:
            assert word in caught.value.text
            assert word in warning
    assert len(node.do(nodes.warnings_of)) == 1


@pytest.mark.parametrize(
    "kinds",
    [CONTAINER, ("pid",), ("user",), (*CONTAINER, "user"), NOT_PIDS],
    ids="+".join,
)
def test_pools_need_the_runtime_directory_and_the_user_only(
    start_contained: Start, kinds: Sequence[str]
) -> None:
    first, second = (_engine(start_contained(kinds), cluster) for cluster in (1, 2))
    nodes.link_pair(first, second)
    _move(first, 2)
    _move(second, 1)
    assert first.do(nodes.warnings_of) == second.do(nodes.warnings_of) == []


def test_registered_memory_needs_no_other_namespace_than_that_of_pids(
    start_contained: Start,
) -> None:
    first, second = (
        _engine(start_contained(NOT_PIDS), cluster, memory="numpy") for cluster in (1, 2)
    )
    nodes.link_pair(first, second)
    _move(first, 2)
    _move(second, 1)


@pytest.mark.parametrize("proc", [True, False], ids=["own proc", "proc of the host"])
def test_registered_memory_of_another_pid_namespace(start_contained: Start, proc: bool) -> None:
    first, second = (
        _engine(start_contained(CONTAINER, proc), cluster, memory)
        for cluster, memory in ((1, "pool"), (2, "numpy"))
    )
    nodes.link_pair(first, second)
    _check_refused(first, 2, "rank 1", OTHER_PIDS, "shareProcessNamespace")
    _move(second, 1)


def test_the_host_reaches_the_memory_of_a_container_and_not_the_other_way_round(
    start_contained: Start, start_node: Start
) -> None:
    host = _engine(start_node(), 1, memory="numpy")
    container = _engine(start_contained(), 2, memory="numpy")
    nodes.link_pair(host, container)
    _move(host, 2)
    _check_refused(container, 1, "rank 0", OTHER_PIDS)


def test_registered_memory_of_another_user_namespace(
    start_contained: Start, start_node: Start
) -> None:
    host = _engine(start_node(), 1, memory="numpy")
    container = _engine(start_contained(("user",)), 2)
    nodes.link_pair(host, container)
    _check_refused(container, 1, f"pid {host.pid}", "it is in another user namespace")


@pytest.mark.parametrize("kinds", [("pid",), ("user",)], ids="+".join)
def test_a_link_without_any_memory_that_can_be_reached_fails_at_both_ends(
    start_contained: Start, start_node: Start, kinds: Sequence[str]
) -> None:
    host, container = start_node(), _engine(start_contained(kinds), 2)
    _engine(host, 1, memory="numpy", pool=0)
    ids = [node.do(nodes.link, "pair", {1: 0, 2: 1}) for node in (host, container)]
    for node, comm_id in zip((host, container), ids, strict=True):
        with pytest.raises(RemoteError):
            node.do(nodes.wait, comm_id)
        assert node.do(nodes.status, comm_id) == RegisterMemStatus.FAILED
        error = node.do(nodes.link_error, comm_id)
        assert "no memory of rank 0" in error
        assert "namespace" in error


def test_a_peer_in_another_pid_namespace_that_is_killed_is_lost(
    start_contained: Start, start_node: Start
) -> None:
    host, container = _engine(start_node(), 1), _engine(start_contained(), 2)
    _, theirs = nodes.link_pair(host, container)
    host.kill()
    nodes.said(container, "WARNING", "cluster 1 is gone")
    assert "cluster 1 is gone" in container.do(nodes.link_error, theirs)
    container.do(nodes.unlink, theirs)


@seccomp.needed
def test_an_older_kernel_gives_no_descriptor_of_a_process_elsewhere(start_contained: Start) -> None:
    """Before Linux 6.5 there is no SO_PEERPIDFD, and a peer in another pid namespace has no number."""
    first, second = start_contained(), start_contained()
    for node in (first, second):
        node.do(seccomp.refuse, [seccomp.PEERPIDFD])
    first, second = _engine(first, 1), _engine(second, 2)
    comm_id, _ = nodes.link_pair(first, second)
    _move(first, 2)
    _move(second, 1)
    second.kill()
    nodes.said(first, "WARNING", "cluster 2 is gone")
    with pytest.raises(RemoteError, match="gone"):
        _move(first, 2)
    first.do(nodes.unlink, comm_id)
    first.do(nodes.deallocate, "blocks")


def test_containers_with_a_runtime_directory_each_miss_each_other(
    start_contained: Start, tmp_path: Path
) -> None:
    made = []
    for cluster in (1, 2):
        path = tmp_path / str(cluster)
        path.mkdir(mode=0o700)
        node = start_contained(DATADIST_RUNTIME_DIR=str(path))
        made.append(_engine(node, cluster, link_total_time=1))
    ids = [node.do(nodes.link, "pair", {1: 0, 2: 1}) for node in made]
    for node, comm_id, other in zip(made, ids, (2, 1), strict=True):
        with pytest.raises(RemoteError):
            node.do(nodes.wait, comm_id)
        error = node.do(nodes.link_error, comm_id)
        assert f"cluster {other}" in error
        assert "no engine with its cluster id is here" in error


def test_engines_of_two_users_say_so_at_both_ends(start_node: Start) -> None:
    """As with volumes that map users (Kubernetes, hostUsers: false): the directory seems to be ours."""
    first, second = start_node(1, link_total_time=5), start_node(2, link_total_time=5)
    ids = []
    for node in (first, second):
        node.do(_map_peers_apart)
        ids.append(node.do(nodes.link, "pair", {1: 0, 2: 1}))
    for node, comm_id, cluster, other in zip(
        (first, second), ids, (2, 1), (second, first), strict=True
    ):
        with pytest.raises(RemoteError):
            node.do(nodes.wait, comm_id)
        error = node.do(nodes.link_error, comm_id)
        assert f"cluster {cluster}" in error
        assert f"belongs to another user (pid {other.pid} of user {privileges.NOBODY}" in error


def _link_to_an_owner(reader: Node, owner: Node) -> None:
    """Engines 1 and 2; the second one has registered memory."""
    _engine(reader, 1)
    _engine(owner, 2, memory="numpy")
    nodes.link_pair(reader, owner)


def test_an_owner_with_capabilities_that_the_reader_lacks(start_node: Start) -> None:
    first, second = start_node(), start_node()
    first.do(privileges.drop_ptrace)
    _link_to_an_owner(first, second)
    _check_refused(first, 2, f"pid {second.pid}", "capabilities that this process lacks")


def test_an_owner_that_is_not_dumpable(start_node: Start) -> None:
    first, second = start_node(), start_node()
    for node in (first, second):
        node.do(privileges.drop_ptrace)
    second.do(privileges.set_dumpable, 0)
    _link_to_an_owner(first, second)
    _check_refused(first, 2, f"pid {second.pid}", "it is not dumpable")


def test_an_owner_that_is_not_dumpable_any_more(start_node: Start) -> None:
    first, second = start_node(), start_node()
    for node in (first, second):
        node.do(privileges.drop_ptrace)
    _link_to_an_owner(first, second)
    _move(first, 2)
    second.do(privileges.set_dumpable, 0)
    with pytest.raises(RemoteError, match="not dumpable"):
        _move(first, 2)
    second.do(privileges.set_dumpable, 1)
    _move(first, 2)


def test_engines_that_changed_their_user_after_their_start(start_node: Start) -> None:
    """The kernel makes such a process not dumpable, and its files in /proc root's."""
    with tempfile.TemporaryDirectory(prefix="datadist-") as place:
        os.chmod(place, 0o755)
        runtime_dir = Path(place) / "run"
        runtime_dir.mkdir(mode=0o700)
        os.chown(runtime_dir, privileges.NOBODY, privileges.NOBODY)
        first, second = start_node(1), start_node(2)
        for node in (first, second):
            node.do(nodes.finalize)  # all modules are imported, which another user may not read
            node.do(_become_owner_of, str(runtime_dir))
        _engine(first, 1)
        _engine(second, 2, memory="numpy")
        nodes.link_pair(first, second)
        _move(second, 1)
        with pytest.raises(RemoteError, match="not dumpable"):
            _move(first, 2)
        second.do(privileges.set_dumpable, 1)
        _move(first, 2)
        for node in (first, second):
            node.do(nodes.finalize)


def test_the_attempt_at_registered_memory_makes_no_page_of_it(start_node: Start) -> None:
    first, second = _engine(start_node(), 1), start_node()
    second.do(nodes.init, 2, enable_remote_cache_accessible=True)
    second.do(_register_untouched)
    nodes.link_pair(first, second)
    assert first.do(nodes.warnings_of) == []
    assert second.do(_pages_made) == 0


def test_dev_shm_and_memlock_are_not_used(start_contained: Start) -> None:
    made = []
    for cluster in (1, 2):
        node = start_contained()
        node.do(_shrink)
        made.append(_engine(node, cluster))
    nodes.link_pair(made[0], made[1])
    _move(made[0], 2)


def test_memory_that_may_not_be_executed(start_contained: Start) -> None:
    """The sysctl vm.memfd_noexec of a pid namespace at its highest."""
    made = []
    for cluster in (1, 2):
        node = start_contained()
        if not node.do(_forbid_execution):
            pytest.skip("this kernel has no vm.memfd_noexec")
        made.append(_engine(node, cluster))
    nodes.link_pair(made[0], made[1])
    _move(made[0], 2)


def _become_owner_of(here: nodes.Here, runtime_dir: str) -> None:
    os.environ["DATADIST_RUNTIME_DIR"] = runtime_dir
    privileges.become(here)


def _map_peers_apart(here: nodes.Here) -> None:
    """From now on the kernel reports peers as of another user."""
    del here
    real = process.peer_of
    for module in (discovery, session):
        module.peer_of = lambda sock: (real(sock)[0], privileges.NOBODY)  # type: ignore[attr-defined]


def _register_untouched(here: nodes.Here) -> None:
    memory = here.any["untouched"] = mmap.mmap(-1, 4 * MIB)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    desc = CacheDesc(1, [4, MIB // 4], DataType.DT_INT32)
    here.live.cache_manager.register_blocks_cache(desc, [address], BlocksCacheKey(2, 0))
    here.any["address"] = address


def _pages_made(here: nodes.Here) -> int:
    page = mmap.PAGESIZE
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(here.any["address"] // page * 8)
        items = memoryview(file.read(4 * MIB // page * 8)).cast("Q")
    return sum(bool(item & PAGEMAP_PRESENT) for item in items)


def _shrink(here: nodes.Here) -> None:
    del here
    namespaces.mount("tmpfs", "/dev/shm", "size=4k")
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))


def _forbid_execution(here: nodes.Here) -> bool:
    del here
    sysctl = Path("/proc/sys/vm/memfd_noexec")
    if not sysctl.exists():
        return False
    sysctl.write_text("2")
    return True

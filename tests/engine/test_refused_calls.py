"""Engines whose system calls are refused, as by the seccomp filters of containers and services."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from datadist import BlocksCacheKey, RegisterMemStatus
from tests import nodes, seccomp
from tests.nodes import Node, RemoteError

pytestmark = seccomp.needed

Start = Callable[..., Node]
REFUSALS = [errno.EPERM, errno.ENOSYS]
SHAPE = [4, 1024]


def _filtered(
    start_node: Start, cluster: int, calls: Sequence[str], error: int, **settings: Any
) -> Node:
    node = start_node()
    node.do(seccomp.refuse, calls, error)
    node.do(nodes.init, cluster, **settings)
    return node


def _with_blocks(node: Node, cluster: int, memory: str = "pool") -> Node:
    node.do(nodes.make, "blocks", "blocks", SHAPE, 2, BlocksCacheKey(cluster, 0), memory)
    node.do(nodes.fill, "blocks", cluster)
    return node


def _pull(node: Node, cluster: int) -> None:
    node.do(nodes.pull_blocks, BlocksCacheKey(cluster, 0), "blocks", [1], [2])
    assert (node.do(nodes.read, "blocks")[0][2] == nodes.pattern(cluster, 0, tuple(SHAPE))[1]).all()


def _push(node: Node, cluster: int) -> None:
    node.do(nodes.push_blocks, BlocksCacheKey(cluster, 0), "blocks", [0], [3])


@pytest.mark.parametrize("error", REFUSALS)
@pytest.mark.parametrize(
    "calls",
    [
        seccomp.NO_PIDFD,
        (seccomp.PEERPIDFD,),
        ("eventfd2",),
        ("madvise",),
        ("fallocate",),
        ("mincore",),
        ("fstatfs",),
        ("setpriority", "membarrier", "pidfd_send_signal", "prctl"),
        ("sched_getaffinity",),
        ("process_vm_readv", "process_vm_writev"),
    ],
    ids="+".join,
)
def test_pools_need_none_of_these(start_node: Start, calls: Sequence[str], error: int) -> None:
    options = {"enable_remote_cache_accessible": True}
    first = _with_blocks(_filtered(start_node, 1, calls, error, **options), 1)
    second = _with_blocks(start_node(2, **options), 2)
    nodes.link_pair(first, second)
    for node, other in ((first, 2), (second, 1)):
        _pull(node, other)
        _push(node, other)
    assert first.do(nodes.log_of, "WARNING") == second.do(nodes.log_of, "WARNING") == []


@pytest.mark.parametrize("error", REFUSALS)
def test_what_replaces_a_refused_call_is_logged(start_node: Start, error: int) -> None:
    node = _filtered(start_node, 1, ("eventfd2", *seccomp.NO_PIDFD), error)
    log = "\n".join(node.do(nodes.log_of, "INFO"))
    assert "eventfd2 is refused" in log
    assert "the end of the connection tells the end of a peer" in log


@pytest.mark.parametrize("error", REFUSALS)
@pytest.mark.parametrize("call", ["epoll_create1", "memfd_create", "socket"])
def test_init_names_a_call_that_it_cannot_do_without(
    start_node: Start, call: str, error: int
) -> None:
    with pytest.raises(RemoteError, match=call) as caught:
        _filtered(start_node, 1, (call,), error)
    assert caught.value.status in ("LLM_FAILED", "LLM_PARAM_INVALID")
    assert "seccomp profile" in caught.value.text


@pytest.mark.parametrize("calls", [seccomp.NO_PIDFD, ()], ids=["no pidfd", "pidfd"])
def test_the_death_of_a_peer_is_noticed_without_a_descriptor_of_it(
    start_node: Start, calls: Sequence[str]
) -> None:
    options = {"enable_remote_cache_accessible": True}
    first = _with_blocks(_filtered(start_node, 1, calls, errno.EPERM, **options), 1)
    second = _with_blocks(start_node(2, **options), 2, memory="numpy")
    comm_id, _ = nodes.link_pair(first, second)
    _pull(first, 2)
    second.kill()
    nodes.said(first, "WARNING", "cluster 2 is gone")
    assert "cluster 2 is gone" in first.do(nodes.link_error, comm_id)
    with pytest.raises(RemoteError, match=r"gone|lost|ended"):
        _push(first, 2)
    first.do(nodes.unlink, comm_id)
    first.do(nodes.deallocate, "blocks")
    for _ in range(3):  # the memory that the dead peer could write is used again
        _with_blocks(first, 1)
        first.do(nodes.deallocate, "blocks")


@pytest.mark.parametrize("error", REFUSALS)
def test_registered_memory_that_this_process_may_not_read(start_node: Start, error: int) -> None:
    calls = ("process_vm_readv", "process_vm_writev")
    first = _with_blocks(_filtered(start_node, 1, calls, error), 1)
    second = _with_blocks(start_node(2), 2, memory="numpy")
    nodes.link_pair(first, second)
    (warning,) = first.do(nodes.log_of, "WARNING")
    for word in (
        "link 'pair'",
        f"rank 1 (pid {second.pid})",
        "process_vm_readv",
        "seccomp profile",
    ):
        assert word in warning
    with pytest.raises(RemoteError, match=r"process_vm_readv.*seccomp profile") as caught:
        _pull(first, 2)
    assert caught.value.status == "LLM_FAILED"
    _pull(second, 1)  # the other direction, from the pool
    assert second.do(nodes.log_of, "WARNING") == []


def test_registered_memory_that_can_only_be_read(start_node: Start) -> None:
    options = {"enable_remote_cache_accessible": True}
    first = _with_blocks(
        _filtered(start_node, 1, ("process_vm_writev",), errno.EPERM, **options), 1
    )
    second = _with_blocks(start_node(2, **options), 2, memory="numpy")
    nodes.link_pair(first, second)
    (warning,) = first.do(nodes.log_of, "WARNING")
    assert "can be read, but not written: process_vm_writev" in warning
    _pull(first, 2)
    with pytest.raises(RemoteError, match=r"process_vm_writev.*seccomp profile"):
        _push(first, 2)
    _pull(first, 2)


def test_a_link_fails_at_both_ends_where_no_memory_can_be_reached(start_node: Start) -> None:
    first = _filtered(start_node, 1, ("process_vm_readv",), errno.EPERM)
    second = _with_blocks(start_node(2, pool=0), 2, memory="numpy")
    ids = [node.do(nodes.link, "pair", {1: 0, 2: 1}) for node in (first, second)]
    for node, comm_id in zip((first, second), ids, strict=True):
        with pytest.raises(RemoteError):
            node.do(nodes.wait, comm_id)
        assert node.do(nodes.status, comm_id) == RegisterMemStatus.FAILED
        error = node.do(nodes.link_error, comm_id)
        assert f"no memory of rank 1 (pid {second.pid}) can be reached: process_vm_readv" in error


def test_memory_that_is_registered_after_the_link(start_node: Start) -> None:
    first = _with_blocks(_filtered(start_node, 1, ("process_vm_readv",), errno.EPERM), 1)
    second = start_node(2)
    comm_ids = nodes.link_pair(first, second)
    assert first.do(nodes.log_of, "WARNING") == []
    _with_blocks(second, 2, memory="numpy")
    with pytest.raises(RemoteError, match="registered after"):
        _pull(first, 2)
    for node, comm_id in zip((first, second), comm_ids, strict=True):
        node.do(nodes.unlink, comm_id)
    nodes.link_pair(first, second)
    (warning,) = first.do(nodes.log_of, "WARNING")
    assert "process_vm_readv" in warning

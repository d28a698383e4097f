"""Pools that memory does not suffice for, in memory cgroups: refused in words, and nobody is killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from datadist import LLMDataDist, LLMRole
from tests import groups, nodes
from tests.nodes import MIB, Node, RemoteError

Start = Callable[..., Node]
LIMIT = 256 * MIB


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A memory cgroup."""
    first = {"memory.limit_in_bytes": LIMIT}
    with groups.group("memory", first, {"memory.max": LIMIT, "memory.swap.max": 0}) as path:
        yield path


def _init(here: nodes.Here, cluster: int, size: int, **options: str) -> None:
    here.engine = LLMDataDist(LLMRole.MIX, cluster)
    own = {f"datadist.shm.{name}": value for name, value in options.items()}
    here.live.init(
        {
            "llm.EnableCacheManager": "1",
            "llm.TransferBackend": "shm",
            "llm.MemPoolConfig": f'{{"memory_size": {size}, "page_shift": 12}}',
            **own,
        }
    )


def _inside(start_node: Start, path: Path) -> Node:
    node = start_node()
    groups.enter(path, node.pid)
    return node


def test_a_pool_beyond_the_cgroup_is_refused(cgroup: Path, start_node: Start) -> None:
    node = _inside(start_node, cgroup)
    with pytest.raises(RemoteError, match=f"available in the memory cgroup {cgroup}") as error:
        node.do(_init, 1, 2 * LIMIT)
    assert error.value.status == "LLM_OUT_OF_MEMORY"
    assert "DATADIST_SHM_OVERCOMMIT" in error.value.text
    node.do(_init, 1, LIMIT // 4)
    node.do(nodes.finalize)


def test_a_limit_further_up_counts(cgroup: Path, start_node: Start) -> None:
    inner = cgroup / "inner"
    inner.mkdir()
    try:
        node = _inside(start_node, inner)
        with pytest.raises(RemoteError, match=f"the memory cgroup {cgroup}") as error:
            node.do(_init, 1, 2 * LIMIT)
        assert error.value.status == "LLM_OUT_OF_MEMORY"
        node.kill()
    finally:
        groups.remove(inner)


def test_two_pools_that_do_not_fit_together(cgroup: Path, start_node: Start) -> None:
    """The first one's pages are not made yet; when its process ends, they need not be."""
    first, second = _inside(start_node, cgroup), _inside(start_node, cgroup)
    first.do(_init, 1, LIMIT * 5 // 8, populate="0")
    with pytest.raises(RemoteError, match="that pools of engines here will take") as error:
        second.do(_init, 2, LIMIT * 5 // 8)
    assert error.value.status == "LLM_OUT_OF_MEMORY"
    first.kill()
    second.do(_init, 2, LIMIT * 5 // 8)
    second.do(nodes.finalize)


def test_two_pools_that_begin_at_a_time(cgroup: Path, start_node: Start) -> None:
    """One of them gets the room."""
    both = [_inside(start_node, cgroup) for _ in range(2)]
    for cluster, node in enumerate(both, 1):
        node.begin(_init, cluster, LIMIT * 5 // 8)
    assert sorted(map(_outcome, both)) == ["LLM_OUT_OF_MEMORY", "OK"]


def _outcome(node: Node) -> str:
    try:
        node.result()
    except RemoteError as error:
        return str(error.status)
    return "OK"


def test_pools_of_others_do_not_count_in_a_cgroup(cgroup: Path, start_node: Start) -> None:
    other = start_node()
    other.do(_init, 1, 4 * LIMIT, populate="0")
    node = _inside(start_node, cgroup)
    node.do(_init, 2, LIMIT // 2)
    node.do(nodes.finalize)


@pytest.mark.parametrize("options", [{"overcommit": "1"}, {"populate": "0"}])
def test_who_takes_the_risk_is_warned(
    cgroup: Path, start_node: Start, options: dict[str, Any]
) -> None:
    node = _inside(start_node, cgroup)
    node.do(_init_sparse, options)
    nodes.said(node, "WARNING", "may be killed for want of memory", str(cgroup))


def _init_sparse(here: nodes.Here, options: dict[str, Any]) -> None:
    """Without pages: who makes them is killed."""
    from datadist_shm import _native

    _native.populate = lambda *_: None
    _init(here, 1, 2 * LIMIT, **options)

"""A forked child keeps no memory of pools after their owners have ended."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datadist import BlocksCacheKey, CacheDesc, DataType, LLMException
from tests import nodes
from tests.nodes import MIB, SECONDS, Node

Start = Callable[..., Node]


def _fork(here: nodes.Here, with_arrays: bool) -> int:
    """A child that lives until its pipe is closed, and says what its arrays hold."""
    if not with_arrays:
        here.arrays.clear()
    ours, theirs = os.pipe()
    child = os.fork()
    if child:
        os.close(ours)
        here.any["pipe"] = theirs
        return child
    os.close(theirs)
    held = [int(array.sum()) for array in here.arrays.get("c", ())]
    Path(here.any["place"], "sums").write_text(repr(held))
    os.read(ours, 1)
    os._exit(0)


def _mapped(pid: int) -> list[str]:
    """Lines of the child's mappings and descriptors of pools."""
    maps = [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "memfd:" in line]
    links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    return maps + [link for link in links if "memfd:" in link]


def _wait_for(path: Path) -> str:
    deadline = time.monotonic() + SECONDS
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return path.read_text()


@pytest.fixture
def linked(start_node: Start, tmp_path: Path) -> tuple[Node, Node]:
    """Two engines with arrays over their pools, which have pulled from each other."""
    pair = start_node(1, pool=32 * MIB), start_node(2, pool=48 * MIB)
    for cluster, node in enumerate(pair, 1):
        node.do(_set, str(tmp_path))
        node.do(nodes.make, "c", "blocks", [2, 1024], 1, BlocksCacheKey(cluster))
        node.do(nodes.fill, "c", cluster)
    nodes.link_pair(*pair)
    pair[1].do(nodes.make, "d", "blocks", [2, 1024], 1)
    pair[1].do(nodes.pull_blocks, BlocksCacheKey(1), "d", [0], [0])
    return pair


def _set(here: nodes.Here, place: str) -> None:
    here.any["place"] = place


def test_a_child_without_arrays_keeps_nothing(linked: tuple[Node, Node], tmp_path: Path) -> None:
    owner, we = linked
    child = we.do(_fork, False)
    assert _wait_for(tmp_path / "sums") == "[]"
    assert _mapped(child) == []
    we.do(nodes.pull_blocks, BlocksCacheKey(1), "d", [1], [1])  # the parent is not disturbed
    owner.kill()
    assert _mapped(child) == []


def test_arrays_can_be_read_in_a_child_which_keeps_no_peers_memory(
    linked: tuple[Node, Node], tmp_path: Path
) -> None:
    _, we = linked
    child = we.do(_fork, True)
    said = _wait_for(tmp_path / "sums")
    assert said == repr([int(nodes.pattern(2, 0, (2, 1024)).sum())])
    sizes = {
        line.split()[0] for line in _mapped(child) if "memfd:" in line and "-" in line.split()[0]
    }
    assert len(sizes) == 1, "its parent's pool alone"


@pytest.mark.parametrize("memory", ["pool", "numpy", "tensors", "pool tensor"])
def test_caches_have_no_tensors_in_a_child(linked: tuple[Node, Node], memory: str) -> None:
    if memory in ("pool", "numpy"):
        linked[1].do(nodes.make, "e", "blocks", [2, 1024], 1, memory=memory)
    else:
        linked[1].do(_register, "e", memory == "pool tensor")
    assert linked[1].do(_ask_in_child, "e") == "its process forked"


def _register(here: nodes.Here, label: str, pooled: bool) -> None:
    """A cache over a tensor that nothing else refers to."""
    manager = here.live.cache_manager
    tensor: Any = np.zeros((2, 1024), np.int32)
    if pooled:
        tensor = manager.allocate_tensor([2, 1024], DataType.DT_INT32)
    here.caches[label] = manager.register_blocks_cache(CacheDesc.from_tensors([tensor]), [tensor])


def test_a_child_keeps_no_pool_for_tensors_of_caches(
    linked: tuple[Node, Node], tmp_path: Path
) -> None:
    _, we = linked
    we.do(_register, "e", True)
    used = we.do(_pages_used)
    child = we.do(_fork, False)
    assert _wait_for(tmp_path / "sums") == "[]"
    assert _mapped(child) == []
    assert we.do(_pages_used) == used, "the parent still has it"


def _pages_used(here: nodes.Here) -> int:
    return int(here.live.stats()["pools"]["DEVICE"]["pages_used"])


def _ask_in_child(here: nodes.Here, label: str) -> str:
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        try:
            here.caches[label].numpy()
        except LLMException as error:
            os.write(theirs, b"its process forked" if "forked" in str(error) else b"?")
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return said

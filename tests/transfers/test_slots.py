"""Slots of caches whose slots differ in size, and those that a cache does not have.

The text says how many it has, which cache it is, and whose.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from datadist import CacheKeyByIdAndIndex
from tests import nodes
from tests.nodes import Node, RemoteError, pattern

Start = Callable[..., Node]


def _said(node: Node, function: Callable[..., Any], *args: Any) -> tuple[str | None, str]:
    with pytest.raises(RemoteError) as caught:
        node.do(function, *args)
    return caught.value.status, str(caught.value)


def _copy(here: nodes.Here, dst: int, src: int) -> None:
    cache = here.caches["c"]
    here.live.cache_manager.copy_cache(cache, cache, dst, src)


def test_slots_of_pulls_and_copies(start_node: Start) -> None:
    owner, puller = start_node(1), start_node(2)
    owner.do(nodes.make, "c", "cache", [4, 50])
    owner.do(nodes.make, "b", "blocks", [8, 50])
    puller.do(nodes.make, "c", "cache", [3, 50])
    nodes.link_pair(owner, puller)
    for slot in (4, 2**32 - 1):
        status, text = _said(puller, nodes.pull_cache, CacheKeyByIdAndIndex(1, 1, slot), "c")
        assert status == "LLM_KV_CACHE_NOT_EXIST"
        assert f"batch_index is {slot}: cache 1 of cluster 1 has 4 slots, 0 to 3" in text
    status, text = _said(puller, nodes.pull_cache, CacheKeyByIdAndIndex(1, 2, 8), "c")
    assert "batch_index is 8: cache 2 of cluster 1 has 8 blocks, 0 to 7" in text
    status, text = _said(puller, nodes.pull_cache, CacheKeyByIdAndIndex(1, 3, 0), "c")
    assert "has no cache for cache id 3" in text
    status, text = _said(puller, nodes.pull_cache, CacheKeyByIdAndIndex(1, 1, 0), "c", 3)
    assert status == "LLM_PARAM_INVALID"
    assert "batch_index is 3: cache 1 of this engine has 3 slots, 0 to 2" in text
    for name, dst, src in (("dst_batch_index", 5, 0), ("src_batch_index", 0, 5)):
        status, text = _said(puller, _copy, dst, src)
        assert f"{name} is 5: cache 1 of this engine has 3 slots, 0 to 2" in text


def test_slots_of_pushes(start_node: Start) -> None:
    pusher, target = start_node(1, local_comm_res=""), start_node(2, local_comm_res="")
    pusher.do(nodes.make, "c", "cache", [4, 50])
    target.do(nodes.make, "c", "cache", [3, 50])
    nodes.link_pair(pusher, target)
    _, text = _said(pusher, nodes.push_cache, CacheKeyByIdAndIndex(2, 1, 3), "c", 0)
    assert "batch_index is 3: cache 1 of cluster 2 has 3 slots, 0 to 2" in text
    _, text = _said(pusher, nodes.push_cache, CacheKeyByIdAndIndex(2, 1, 0), "c", 4)
    assert re.search("src_batch_index is 4: cache 1 of this engine has 4 slots, 0 to 3", text)


@pytest.mark.parametrize("theirs", [20, 50])
def test_a_slot_is_pulled_from_one_of_another_size(start_node: Start, theirs: int) -> None:
    owner, puller = start_node(1), start_node(2)
    owner.do(nodes.make, "c", "cache", [4, theirs])
    owner.do(nodes.fill, "c", 1)
    puller.do(nodes.make, "c", "cache", [3, 30])
    puller.do(nodes.fill, "c", 2)
    nodes.link_pair(owner, puller)
    numbers = min(theirs, 30)
    puller.do(nodes.pull_cache, CacheKeyByIdAndIndex(1, 1, 2), "c", 1, numbers * 4)
    for tensor, array in enumerate(puller.do(nodes.read, "c")):
        expected = pattern(2, tensor, (3, 30))
        expected[1][:numbers] = pattern(1, tensor, (4, theirs))[2][:numbers]
        np.testing.assert_array_equal(array, expected)

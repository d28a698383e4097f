"""What differs from upstream on purpose and is shown nowhere else; numbers are those of docs/api.md."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest

from datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LayerSynchronizer,
    LLMException,
    LLMRole,
    Placement,
    TransferWithCacheKeyConfig,
)
from tests import nodes
from tests.nodes import Here, Node, RemoteError, pattern

Start = Callable[..., Node]
Ports = Callable[[int], list[int]]
INVALID = 2**64 - 1
SHAPE, TENSORS = (4, 30), 4
HOST_POOL = '{"memory_size": 1048576, "page_shift": 12}'


def _pair(start: Start, **settings: Any) -> tuple[Node, Node]:
    """An owner (cluster 1) and a caller (cluster 2), which :func:`_link` links."""
    return start(1, **settings), start(2, **settings)


def _make(node: Node, label: str, kind: str = "cache", *args: Any, seed: int = 9) -> None:
    node.do(nodes.make, label, kind, list(SHAPE), TENSORS, *args)
    node.do(nodes.fill, label, seed)


def _expect(node: Node, label: str, rows: dict[int, int], seed: int = 1) -> None:
    """Row ``n`` of every tensor is row ``rows[n]`` of the owner's, filled with ``seed``."""
    for tensor, array in enumerate(node.do(nodes.read, label)):
        expected = pattern(9, tensor, SHAPE)
        for row, source in rows.items():
            expected[row] = pattern(seed, tensor, SHAPE)[source]
        np.testing.assert_array_equal(array, expected)


def _unknown(node: Node, function: Callable[..., Any], *args: Any) -> None:
    with pytest.raises(RemoteError) as caught:
        node.do(function, *args)
    assert caught.value.status == "LLM_KV_CACHE_NOT_EXIST"


# -- 12: placements -------------------------------------------------------------------------------


def _on_both(here: Here, seed: int) -> None:
    for placement, kind in product(Placement, ("cache", "blocks")):
        manager = here.live.cache_manager
        desc = CacheDesc(TENSORS, SHAPE, DataType.DT_INT32, placement)
        make = manager.allocate_cache if kind == "cache" else manager.allocate_blocks_cache
        label = f"{placement.name} {kind}"
        here.caches[label] = make(desc)
        here.arrays[label] = here.caches[label].numpy()
        nodes.fill(here, label, seed)


def _blocks_by_model(here: Here) -> None:
    manager = here.live.cache_manager
    for placement in Placement:
        desc = CacheDesc(TENSORS, SHAPE, DataType.DT_INT32, placement)
        cache = manager.allocate_blocks_cache(desc, BlocksCacheKey(1, int(placement)))
        for tensor, array in enumerate(cache.numpy()):
            array[:] = pattern(1, tensor, SHAPE)


@pytest.mark.parametrize("one_sided", [False, True])
def test_pulls_between_any_placements(start_node: Start, one_sided: bool) -> None:
    owner, caller = _pair(
        start_node, host_mem_pool_cfg=HOST_POOL, enable_remote_cache_accessible=one_sided
    )
    owner.do(_on_both, 1)
    owner.do(_blocks_by_model)
    caller.do(_on_both, 9)
    nodes.link_pair(owner, caller)
    ids = {Placement.HOST: 1, Placement.DEVICE: 3}
    for theirs, mine in product(Placement, Placement):
        label = f"{mine.name} cache"
        caller.do(nodes.fill, label, 9)
        caller.do(nodes.pull_cache, CacheKeyByIdAndIndex(1, ids[theirs], 3), label, 1)
        _expect(caller, label, {1: 3})
        label = f"{mine.name} blocks"
        caller.do(nodes.fill, label, 9)
        caller.do(nodes.pull_blocks, CacheKeyByIdAndIndex(1, ids[theirs], 2), label, [], [3])
        caller.do(nodes.pull_blocks, BlocksCacheKey(1, int(theirs)), label, [0, 3], [1, 0])
        _expect(caller, label, {3: 2, 1: 0, 0: 3})


# -- 9, 11: descriptions and registrations ----------------------------------------------------------


def _both_kinds_of_one_description(here: Here) -> list[bool]:
    manager = here.live.cache_manager
    desc = CacheDesc(TENSORS, SHAPE, DataType.DT_INT32)
    blocks = manager.allocate_blocks_cache(desc, BlocksCacheKey(1, 0))
    slots = manager.allocate_cache(desc, [CacheKey(1, 1)])
    return [blocks.is_blocks_cache, slots.is_blocks_cache]


def test_a_description_serves_caches_of_both_kinds(start_node: Start) -> None:
    owner, caller = _pair(start_node)
    assert owner.do(_both_kinds_of_one_description) == [True, False]
    _make(caller, "slots")
    _make(caller, "blocks", "blocks")
    nodes.link_pair(owner, caller)
    caller.do(nodes.pull_cache, CacheKey(1, 1), "slots")
    caller.do(nodes.pull_blocks, BlocksCacheKey(1, 0), "blocks", [0], [0])


def _register_twice(here: Here) -> list[int]:
    arrays = [np.zeros(SHAPE, np.int32) for _ in range(TENSORS)]
    here.arrays["shared"] = arrays
    manager = here.live.cache_manager
    desc = CacheDesc(TENSORS, SHAPE, DataType.DT_INT32)
    addresses = [int(array.ctypes.data) for array in arrays]
    nodes.fill(here, "shared", 1)
    return [manager.register_cache(desc, addresses).cache_id for _ in range(2)]


def _unregister(here: Here, cache_id: int) -> None:
    here.live.cache_manager.unregister_cache(cache_id)


def test_a_range_stays_registered_for_the_cache_that_is_left(start_node: Start) -> None:
    owner, caller = _pair(start_node)
    first, second = owner.do(_register_twice)
    _make(caller, "slots")
    nodes.link_pair(owner, caller)
    owner.do(_unregister, first)
    caller.do(nodes.pull_cache, CacheKeyByIdAndIndex(1, second, 2), "slots", 0)
    _expect(caller, "slots", {0: 2})
    _unknown(caller, nodes.pull_cache, CacheKeyByIdAndIndex(1, first, 2), "slots")


# -- 13, 14: what a key names -----------------------------------------------------------------------


def test_a_key_names_its_slot_in_one_sided_mode_too(start_node: Start) -> None:
    owner, caller = _pair(start_node, enable_remote_cache_accessible=True)
    keys = [CacheKey(1, 10), CacheKey(1, 11), CacheKey(1, INVALID, 0, 20)]
    _make(owner, "src", "cache", keys, seed=1)
    _make(caller, "dst", "blocks")
    nodes.link_pair(owner, caller)
    caller.do(nodes.pull_blocks, CacheKey(1, 11), "dst", [], [0])
    caller.do(nodes.pull_blocks, CacheKey(1, INVALID, 0, 20), "dst", [], [1])
    caller.do(nodes.pull_blocks, CacheKeyByIdAndIndex(1, 1, 3), "dst", [], [3])
    _expect(caller, "dst", {0: 1, 1: 2, 3: 3})


def test_the_slot_of_a_prefix_can_be_pulled_by_id(start_node: Start) -> None:
    owner, caller = _pair(start_node)
    _make(owner, "src", "cache", [CacheKey(1, INVALID, 0, 20)], seed=1)
    _make(caller, "dst")
    nodes.link_pair(owner, caller)
    for _ in range(2):
        caller.do(nodes.pull_cache, CacheKeyByIdAndIndex(1, 1, 0), "dst", 2)
    _expect(caller, "dst", {2: 0})


def test_layers_are_counted_for_each_key(start_node: Start) -> None:
    owner, caller = _pair(start_node)
    _make(owner, "src", "cache", [CacheKey(1, 10), CacheKey(1, 11)], seed=1)
    _make(caller, "dst")
    nodes.link_pair(owner, caller)
    caller.do(nodes.pull_cache, CacheKey(1, 10), "dst")
    half: dict[str, Any] = {"src_layer_range": range(1), "dst_layer_range": range(1)}
    for _ in range(2):
        caller.do(nodes.pull_cache, CacheKey(1, 11), "dst", 1, **half)
    caller.do(nodes.pull_cache, CacheKey(1, 11), "dst", 1)
    _expect(caller, "dst", {0: 0, 1: 1})
    _unknown(caller, nodes.pull_cache, CacheKey(1, 11), "dst")


def test_what_is_new_or_gone_at_the_owner_is_seen_in_one_sided_mode(start_node: Start) -> None:
    owner, caller = _pair(start_node, enable_remote_cache_accessible=True)
    _make(owner, "old", seed=1)
    _make(caller, "slots")
    _make(caller, "blocks", "blocks")
    nodes.link_pair(owner, caller)
    caller.do(nodes.pull_cache, CacheKeyByIdAndIndex(1, 1), "slots")
    _make(owner, "new", "blocks", BlocksCacheKey(1, 5), seed=2)
    caller.do(nodes.pull_blocks, BlocksCacheKey(1, 5), "blocks", [3], [0])
    _expect(caller, "blocks", {0: 3}, seed=2)
    owner.do(nodes.deallocate, "old")
    _unknown(caller, nodes.pull_cache, CacheKeyByIdAndIndex(1, 1), "slots")
    for nothing in (0, -1):
        _unknown(caller, nodes.pull_cache, CacheKeyByIdAndIndex(1, nothing), "slots")


# -- asynchronous transfers -----------------------------------------------------------------------


class Always(LayerSynchronizer):
    """Every layer is final."""

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        """Yes."""
        return True


def _send(here: Here, configs: list[TransferWithCacheKeyConfig]) -> list[str | None]:
    task = here.live.cache_manager.transfer_cache_async(here.caches["src"], Always(), configs)
    return [None if code is None else code.name for code in task.get_results(20_000)]


def test_configs_to_one_cluster_have_results_of_their_own(start_node: Start) -> None:
    target, sender = _pair(start_node, enable_remote_cache_accessible=True)
    _make(sender, "src", seed=1)
    _make(target, "dst")
    nodes.link_pair(target, sender)
    key = CacheKeyByIdAndIndex(1, 1, 3)
    configs = [
        TransferWithCacheKeyConfig(key, range(1), range(1)),
        TransferWithCacheKeyConfig(key, range(2), range(1, 3)),
    ]
    assert sender.do(_send, configs) == ["LLM_SUCCESS", "LLM_PARAM_INVALID"]


# -- 7, 8: links by address -----------------------------------------------------------------------


def test_a_forced_unlink_is_heard_of_by_the_peer(start_node: Start, free_ports: Ports) -> None:
    (port,) = free_ports(1)
    server = start_node(1, listen_ip_info=f"127.0.0.1:{port}")
    client = start_node(2)
    assert client.do(nodes.link_clusters, [(1, port)])[0] == "LLM_SUCCESS"
    assert client.do(nodes.unlink_clusters, [(1,)], 10_000, True)[0] == "LLM_SUCCESS"
    deadline = time.monotonic() + nodes.SECONDS
    while (refusal := server.do(_switch)) is not None:
        assert refusal == "LLM_EXIST_LINK"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _switch(here: Here) -> str | None:
    try:
        here.live.switch_role(LLMRole.DECODER)
    except LLMException as error:
        return error.status_code.name
    return None


def test_linking_with_oneself_is_refused(start_node: Start, free_ports: Ports) -> None:
    (port,) = free_ports(1)
    node = start_node(1, listen_ip_info=f"127.0.0.1:{port}")
    refused = ("LLM_PARAM_INVALID", ["LLM_PARAM_INVALID"])
    assert node.do(nodes.link_clusters, [(1, port)]) == refused
    assert "this engine itself" in node.do(nodes.log_of, "ERROR")[-1]

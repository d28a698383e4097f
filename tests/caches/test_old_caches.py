"""Caches of an engine that was finalized, beside those with the same ids that its next start made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKeyByIdAndIndex,
    DataType,
    LLMException,
    LLMStatusCode,
    MemInfo,
    Memtype,
)
from tests import nodes
from tests.nodes import Node, pattern

BLOCKS, WIDTH, TENSORS = 4, 10, 2
SHAPE = (BLOCKS, WIDTH)
LABELS = ("slots", "blocks")
SLOT_KEY, BLOCKS_KEY = CacheKeyByIdAndIndex(1, 1, 0), BlocksCacheKey(1, 0)


def _make_all(here: nodes.Here, memory: str, key: BlocksCacheKey | None) -> None:
    """Caches 1 and 2, the latter of blocks; the test must not depend on what they were before."""
    nodes.make(here, "slots", "cache", list(SHAPE), TENSORS, None, memory)
    nodes.make(here, "blocks", "blocks", list(SHAPE), TENSORS, key, memory)
    assert [cache.cache_id for cache in here.caches.values()] == [1, 2]
    for label in here.caches:
        nodes.fill(here, label, 1 if key else 2)


def _start_again(here: nodes.Here, memory: str) -> None:
    """Finalize, init, and make the same caches anew; the old ones are kept as "old"."""
    here.live.finalize()
    here.any["old"] = dict(here.caches)
    here.any["old arrays"] = dict(here.arrays)  # registered memory must live on
    here.caches.clear()
    nodes.init(here, 2, enable_remote_cache_accessible=True)
    _make_all(here, memory, None)


def _use(here: nodes.Here, which: str) -> list[str]:
    """Pull into and push from these caches, each twice; the outcomes."""
    manager = here.live.cache_manager
    caches = here.any["old"] if which == "old" else here.caches
    slots, blocks = caches["slots"], caches["blocks"]
    calls: list[Callable[[], None]] = [
        lambda: manager.pull_cache(SLOT_KEY, slots, 1),
        lambda: manager.pull_blocks(BLOCKS_KEY, blocks, [1], [3]),
        lambda: manager.pull_blocks(BLOCKS_KEY, blocks, np.array([1]), np.array([3])),
        lambda: manager.push_cache(SLOT_KEY, slots, 1),
        lambda: manager.push_blocks(BLOCKS_KEY, blocks, [3], [1]),
        lambda: manager.copy_cache(here.caches["slots"], slots, 2, 0),
        lambda: manager.copy_blocks(blocks, {0: [2]}),
    ]
    return [_outcome(call) for call in calls for _ in range(2)]


def _outcome(call: Callable[[], Any]) -> str:
    try:
        call()
    except LLMException as error:
        return error.status_code.name if "engine was finalized" in str(error) else str(error)
    return "OK"


def _contents(node: Node) -> list[NDArray[np.int32]]:
    return [array for label in LABELS for array in node.do(nodes.read, label)]


def _fill_all(here: nodes.Here, seed: int) -> None:
    for label in LABELS:
        nodes.fill(here, label, seed)


def _expect(node: Node, seed: int) -> None:
    wanted = [pattern(seed, index, SHAPE) for _ in LABELS for index in range(TENSORS)]
    for array, expected in zip(_contents(node), wanted, strict=True):
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("memory", ["pool", "numpy"])
def test_an_old_cache_moves_nothing(start_node: Callable[..., Node], memory: str) -> None:
    owner = start_node(1, enable_remote_cache_accessible=True)
    user = start_node(2, enable_remote_cache_accessible=True)
    owner.do(_make_all, memory, BlocksCacheKey(1, 0))
    user.do(_make_all, memory, None)
    comm_id, _ = nodes.link_pair(owner, user)
    assert set(user.do(_use, "live")) == {"OK"}
    owner.do(nodes.unlink, comm_id)
    user.do(_start_again, memory)
    nodes.link_pair(owner, user)
    assert set(user.do(_use, "live")) == {"OK"}  # so that the ways of the new ones are known
    for node, seed in ((owner, 1), (user, 2)):
        node.do(_fill_all, seed)
    assert set(user.do(_use, "old")) == {"LLM_KV_CACHE_NOT_EXIST"}
    _expect(owner, 1)
    _expect(user, 2)
    assert user.do(_free_old) == (2, [])
    assert set(user.do(_use, "live")) == {"OK"}


def _free_old(here: nodes.Here) -> tuple[int, list[int]]:
    """Free the old ones in every way; caches that live on, and addresses that the old ones have."""
    manager, old = here.live.cache_manager, here.any["old"]
    with old["slots"], old["blocks"]:
        pass
    manager.deallocate_cache(old["slots"])
    manager.deallocate_blocks_cache(old["blocks"])
    engine = here.live._live(LLMStatusCode.LLM_FAILED)
    left = [address for cache in old.values() for address in cache.tensor_addrs]
    return sum(engine.owned.get(cache.cache_id) is not None for cache in old.values()), left


def test_an_old_manager_is_refused(runtime_dir: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATADIST_RUNTIME_DIR", str(runtime_dir))
    here = nodes.Here()
    nodes.init(here, 1, enable_remote_cache_accessible=True)
    old = here.live.cache_manager
    here.live.finalize()
    nodes.init(here, 1, enable_remote_cache_accessible=True)
    try:
        manager = here.live.cache_manager
        desc = CacheDesc(TENSORS, list(SHAPE), DataType.DT_INT32)
        slots, blocks = manager.allocate_cache(desc), manager.allocate_blocks_cache(desc)
        calls: list[Callable[[], Any]] = [
            lambda: old.pull_cache(CacheKeyByIdAndIndex(2, 1), slots),
            lambda: old.pull_blocks(BlocksCacheKey(2), blocks, [0], [0]),
            lambda: old.push_cache(CacheKeyByIdAndIndex(2, 1), slots),
            lambda: old.push_blocks(BlocksCacheKey(2), blocks, [0], [0]),
            lambda: old.copy_cache(slots, slots, 0, 1),
            lambda: old.copy_blocks(blocks, {0: [1]}),
            lambda: old.deallocate_cache(slots),
            lambda: old.deallocate_blocks_cache(blocks),
            lambda: old.register_cache(desc, [1, 2]),
            lambda: old.register_blocks_cache(desc, [1, 2]),
            lambda: old.allocate_blocks_cache(desc),
            lambda: old.unregister_cache(slots.cache_id),
            lambda: old.remap_registered_memory(MemInfo(Memtype.MEM_TYPE_DEVICE, 1, 1)),
        ]
        for number, call in enumerate(calls):
            with pytest.raises(LLMException, match="finalized") as caught:
                call()
            assert caught.value.status_code.name == "LLM_ENGINE_FINALIZED", number
        assert slots.tensor_addrs
        assert blocks.tensor_addrs
        assert manager.allocate_cache(desc).cache_id == 3
    finally:
        here.live.finalize()

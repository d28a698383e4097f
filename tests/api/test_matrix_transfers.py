"""Every check of the cache manager's transfers before a peer is asked, in the documented order.

The peer is not linked, so that a call that breaks nothing ends with LLM_NOT_YET_LINK. What is checked
against a linked peer is in test_matrix_linked.py. Source of the rows: LLM-DataDist API, CacheManager.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from datadist import (
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
    LayerSynchronizer,
    LLMStatusCode,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from datadist.keys import INVALID_ID
from tests.matrix import OWN, PEER, Check, Of, Table, Worlds, cases, verify, worlds_in

PI = LLMStatusCode.LLM_PARAM_INVALID
FINALIZED = LLMStatusCode.LLM_ENGINE_FINALIZED
UNKNOWN = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
NOT_LINKED = LLMStatusCode.LLM_NOT_YET_LINK
BY_ID = CacheKeyByIdAndIndex(PEER, 1)


class Always(LayerSynchronizer):
    """Every layer is final."""

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        """Yes."""
        return True


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    """One engine at a time, in the state that a case needs."""
    with worlds_in(tmp_path_factory.mktemp("run")) as each:
        yield each


PER_LAYER = (
    Check(TypeError, "tensor_num_per_layer is a str", {"tensor_num_per_layer": "2"}),
    Check(TypeError, "tensor_num_per_layer is a NoneType", {"tensor_num_per_layer": None}),
    Check(ValueError, "tensor_num_per_layer", {"tensor_num_per_layer": -1}),
    Check(ValueError, "tensor_num_per_layer", {"tensor_num_per_layer": 1 << 32}),
    Check(PI, "tensor_num_per_layer is 0", {"tensor_num_per_layer": 0}),
)


def _pull_ranges() -> Iterator[Check]:
    for name in ("src_layer_range", "dst_layer_range"):
        yield Check(TypeError, f"{name} is a list", {name: [0, 1]})
        yield Check(PI, "step must be 1", {name: range(-2, 1 << 33, 2)})
        yield Check(PI, "must not start below 0", {name: range(-1, 1 << 33)})
        yield Check(PI, "must not start below 0", {name: range(-1, -1)})
        yield Check(ValueError, f"the last layer of {name}", {name: range(0, (1 << 32) + 1)})


def _push_ranges() -> Iterator[Check]:
    for name in ("src_layer_range", "dst_layer_range"):
        yield Check(TypeError, f"{name} is a list", {name: [0, 1]})
        yield Check(PI, "step must be 1", {name: range(-2, 2, 2)})
        yield Check(PI, "start at 0 or above", {name: range(-1, 1)})
        yield Check(PI, "start at 0 or above", {name: range(1, 1)})
    yield Check(PI, "make no layer of 3", {"tensor_num_per_layer": 3, "dst_layer_range": None})
    yield Check(PI, "differ in length", {"src_layer_range": range(2), "dst_layer_range": range(1)})
    yield Check(PI, "differ in length", {"src_layer_range": range(2)})


def _local_layers(cache: str) -> Iterator[Check]:
    yield Check(
        PI,
        "not a multiple of tensor_num_per_layer",
        {"dst_layer_range": range(9), cache: Of("odd")},
    )
    yield Check(PI, "dst_layer_range ends at layer 2", {"dst_layer_range": range(2)})
    yield Check(PI, "ranges of equal length", {"src_layer_range": range(2)})


def _block_lists(prefix: str) -> tuple[Check, ...]:
    return (
        Check(TypeError, "src_blocks is a NoneType", {"src_blocks": None}),
        Check(TypeError, r"src_blocks\[0\]", {"src_blocks": ["0"]}),
        Check(TypeError, "dst_blocks is a range", {"dst_blocks": range(1)}),
        Check(AttributeError, f"{prefix}_cache is None", {f"{prefix}_cache": None}),
        Check(PI, "is not a blocks cache", {f"{prefix}_cache": Of("contiguous")}),
        Check(PI, "dst_blocks is empty", {"dst_blocks": []}),
    )


PULL_CACHE = (
    Check(TypeError, "only support CacheKey or CacheKeyBy", {"cache_key": BlocksCacheKey(PEER)}),
    Check(
        TypeError,
        "with enable_remote_cache_accessible pull_cache takes CacheKeyByIdAndIndex only",
        {"cache_key": CacheKey(PEER, 1)},
        "one-sided",
    ),
    Check(TypeError, "cache is a int", {"cache": 1}),
    Check(TypeError, "batch_index is a NoneType", {"batch_index": None}),
    Check(ValueError, "batch_index", {"batch_index": -1}),
    Check(TypeError, "size is a str", {"size": "1"}),
    Check(ValueError, "size", {"size": 1 << 63}),
    Check(AttributeError, "cache is None", {"cache": None}),
    Check(PI, "is a blocks cache", {"cache": Of("blocks")}),
    Check(PI, "size is 0", {"size": 0}),
    Check(PI, "size is -2", {"size": -2}),
    *PER_LAYER,
    Check(AttributeError, "cache_key is None", {"cache_key": None}),
    Check(PI, "exactly one of req_id", {"cache_key": CacheKey(OWN, INVALID_ID)}),
    Check(PI, "exactly one of req_id", {"cache_key": CacheKey(OWN, 1, prefix_id=1)}),
    *_pull_ranges(),
    Check(FINALIZED, "finalized", world="finalized"),
    Check(PI, "which is this engine", {"cache_key": CacheKeyByIdAndIndex(OWN, 1)}),
    Check(UNKNOWN, "does not exist", {"cache": Of("freed")}),
    Check(PI, "batch_index is 2", {"batch_index": 2}),
    Check(PI, "size is 1025", {"size": 1025}),
    *_local_layers("cache"),
    Check(NOT_LINKED, "cluster 2 is not linked"),
)

PULL_BLOCKS = (
    Check(TypeError, "only support CacheKey or", {"src_cache_key": "key"}),
    Check(TypeError, "dst_cache is a int", {"dst_cache": 1}),
    *_block_lists("dst"),
    *PER_LAYER,
    Check(AttributeError, "src_cache_key is None", {"src_cache_key": None}),
    Check(PI, "src_blocks is empty", {"src_blocks": (), "src_cache_key": BlocksCacheKey(-1)}),
    Check(PI, "exactly one of req_id", {"src_cache_key": CacheKey(OWN, INVALID_ID)}),
    Check(PI, "src_blocks must be empty", {"src_cache_key": CacheKey(OWN, 1)}),
    Check(PI, "src_blocks must be empty", {"src_cache_key": CacheKeyByIdAndIndex(OWN, 1)}),
    *_pull_ranges(),
    Check(TypeError, "cluster_id is -1", {"src_cache_key": BlocksCacheKey(-1)}),
    Check(
        TypeError, "model_id is 18446744073709551616", {"src_cache_key": BlocksCacheKey(2, 1 << 64)}
    ),
    Check(FINALIZED, "finalized", world="finalized"),
    Check(PI, "which is this engine", {"src_cache_key": BlocksCacheKey(OWN)}),
    Check(UNKNOWN, "does not exist", {"dst_cache": Of("freed_blocks")}),
    Check(PI, "src_blocks has 2 entries and dst_blocks 1", {"src_blocks": [0, 1]}),
    Check(TypeError, r"dst_blocks\[0\] is -1", {"dst_blocks": [-1]}),
    Check(
        TypeError, r"dst_blocks\[9\] is -1", {"src_blocks": [0] * 10, "dst_blocks": [0] * 9 + [-1]}
    ),
    Check(PI, r"dst_blocks\[0\] is 2", {"dst_blocks": [2]}),
    Check(
        PI,
        r"dst_blocks\[1\] is 1, and so is dst_blocks\[0\]",
        {"src_blocks": [0, 1], "dst_blocks": [1, 1]},
    ),
    Check(PI, "dst_layer_range ends at layer 2", {"dst_layer_range": range(2)}),
    Check(PI, "ranges of equal length", {"src_layer_range": range(2)}),
    Check(NOT_LINKED, "cluster 2 is not linked"),
)

PUSH_CACHE = (
    Check(FINALIZED, "finalized", world="finalized"),
    Check(PI, "EnableRemoteCacheAccessible", world="two-sided"),
    Check(TypeError, "only support CacheKeyByIdAndIndex", {"dst_cache_key": CacheKey(PEER, 1)}),
    Check(TypeError, "dst_cache_key is a NoneType", {"dst_cache_key": None}),
    Check(TypeError, "src_cache is a NoneType", {"src_cache": None}),
    Check(TypeError, "src_batch_index is a NoneType", {"src_batch_index": None}),
    Check(ValueError, "src_batch_index", {"src_batch_index": -1}),
    Check(PI, "is a blocks cache", {"src_cache": Of("blocks")}),
    *PER_LAYER,
    *_push_ranges(),
    Check(TypeError, "size is a bool", {"size": True}),
    Check(TypeError, "size is a NoneType", {"size": None}),
    Check(ValueError, "size", {"size": -(1 << 63) - 1}),
    Check(PI, "size is 4", {"size": 4}),
    Check(FINALIZED, "finalized", world="finalized one-sided"),
    Check(UNKNOWN, "does not exist", {"src_cache": Of("freed")}),
    Check(NOT_LINKED, "cluster 2 is not linked"),
)

PUSH_BLOCKS = (
    Check(FINALIZED, "finalized", world="finalized"),
    Check(PI, "EnableRemoteCacheAccessible", world="two-sided"),
    Check(TypeError, "only support BlocksCacheKey", {"dst_cache_key": BY_ID}),
    Check(TypeError, "src_cache is a int", {"src_cache": 1}),
    *_block_lists("src"),
    *PER_LAYER,
    *_push_ranges(),
    Check(AttributeError, "dst_cache_key is None", {"dst_cache_key": None}),
    Check(PI, "src_blocks has 0 entries", {"src_blocks": ()}),
    Check(
        PI,
        r"dst_blocks\[1\] is 1, and so is dst_blocks\[0\]",
        {"src_blocks": [0, 1], "dst_blocks": [1, 1]},
    ),
    Check(FINALIZED, "finalized", world="finalized one-sided"),
    Check(TypeError, "cluster_id is -1", {"dst_cache_key": BlocksCacheKey(-1)}),
    Check(UNKNOWN, "does not exist", {"src_cache": Of("freed_blocks")}),
    Check(NOT_LINKED, "cluster 2 is not linked"),
)


def _async(configs: tuple[Check, ...]) -> tuple[Check, ...]:
    return (
        Check(TypeError, "src_cache is a NoneType", {"src_cache": None}),
        Check(TypeError, "src_cache is a int", {"src_cache": 1}),
        Check(PI, "placement HOST", {"src_cache": Of("on_host")}),
        Check(TypeError, "dst_block_indices is a range", {"dst_block_indices": range(1)}),
        Check(ValueError, r"dst_block_indices\[0\]", {"dst_block_indices": [-1]}),
        Check(TypeError, r"src_block_indices\[0\]", {"src_block_indices": ["0"]}),
        Check(ValueError, r"src_block_indices\[0\]", {"src_block_indices": (1 << 64,)}),
        Check(TypeError, "dst_block_memory_size", {"dst_block_memory_size": "4"}),
        Check(ValueError, "dst_block_memory_size", {"dst_block_memory_size": -1}),
        Check(PI, "needs dst_block_indices", {"src_block_indices": [0], "dst_block_indices": None}),
        Check(
            PI,
            "src_block_indices has 1 entries",
            {"src_block_indices": [0], "dst_block_indices": [0, 1]},
        ),
        Check(
            PI,
            "alone needs dst_block_memory_size",
            {"src_block_indices": None, "dst_block_indices": [0], "dst_block_memory_size": None},
        ),
        Check(TypeError, "layer_synchronizer is a NoneType", {"layer_synchronizer": None}),
        Check(TypeError, "only support LayerSynchronizer", {"layer_synchronizer": Always}),
        Check(TypeError, "transfer_configs is a NoneType", {"transfer_configs": None}),
        *configs[:1],
        Check(
            PI, "without dst_block_indices", {"dst_block_indices": None, "dst_block_memory_size": 4}
        ),
        Check(PI, "odd number of tensors", {"src_cache": Of("odd")}),
        *configs[1:],
    )


def _keyed(source: range, slot: int = 0, cluster: int = PEER) -> list[TransferWithCacheKeyConfig]:
    key = CacheKeyByIdAndIndex(cluster, 1)
    return [TransferWithCacheKeyConfig(key, source, source, slot)]


def _shortened() -> TransferWithCacheKeyConfig:
    (config,) = _keyed(range(1))
    config.dst_layer_range = range(2)
    return config


def _lists() -> Iterator[Check]:
    """What the lists and the source do not allow, whatever the destination is."""
    both = {"src_block_indices": [0], "dst_block_indices": [1]}
    blocks: dict[str, Any] = {"src_cache": Of("blocks")}
    spread: dict[str, Any] = {"dst_block_indices": [0], "dst_block_memory_size": 1024}
    yield Check(PI, "needs a blocks cache", {**both})
    yield Check(PI, "hold 1024 bytes", {**both, **blocks, "dst_block_memory_size": 512})
    beyond = {**both, **blocks, "src_block_indices": [2]}
    yield Check(PI, r"src_block_indices\[0\] is 2: the cache has 2", beyond)
    yield Check(PI, "needs src_block_indices with", {**spread, **blocks})
    yield Check(PI, "it must be in", {**spread, "dst_block_memory_size": 2048})
    yield Check(PI, "it must be in", {**spread, "dst_block_memory_size": 0})
    yield Check(PI, "fill 1 blocks of 1024", {**spread, "dst_block_indices": [0, 1]})
    repeated = {"dst_block_indices": [3, 5, 3], "dst_block_memory_size": 400}
    yield Check(PI, r"dst_block_indices\[2\] is 3, and so is dst_block_indices\[0\]", repeated)


LISTS = tuple(_lists())
BOTH_LISTS = {"src_block_indices": [0], "dst_block_indices": [0]}
ASYNC_TWO_SIDED = _async(
    (
        Check(TypeError, "only support TransferConfig", {"transfer_configs": _keyed(range(1))}),
        Check(
            PI,
            "must be 0 with src_block_indices",
            {**BOTH_LISTS, "transfer_configs": [TransferConfig(PEER, [4], range(2), 1)]},
        ),
        Check(
            PI, "there are 1 layers", {"transfer_configs": [TransferConfig(PEER, [4], range(2))]}
        ),
        Check(PI, "1 layers need 2", {"transfer_configs": [TransferConfig(PEER, [4, 8, 12, 16])]}),
        *LISTS,
        Check(
            PI,
            r"dst_addrs\[1\] is 0x7fffffffffffff00",
            {"transfer_configs": [TransferConfig(PEER, [4, (1 << 63) - 256])]},
        ),
        Check(PI, r"dst_addrs\[0\] is 0x0", {"transfer_configs": [TransferConfig(PEER, [0, 8])]}),
        Check(FINALIZED, "finalized", world="finalized"),
    )
)
ASYNC_ONE_SIDED = _async(
    (
        Check(
            TypeError,
            "only support TransferWithCacheKeyConfig",
            {"transfer_configs": [TransferConfig(PEER, [4])]},
        ),
        Check(
            PI,
            "must be 0 with src_block_indices",
            {**BOTH_LISTS, "transfer_configs": _keyed(range(2), 1)},
        ),
        Check(PI, "there are 1 layers", {"transfer_configs": _keyed(range(2))}),
        *LISTS,
        Check(PI, "differ in length", {"transfer_configs": [_shortened()]}),
        Check(
            PI,
            "give dst_block_indices",
            {
                "transfer_configs": [
                    TransferWithCacheKeyConfig(BlocksCacheKey(PEER), range(1), range(1))
                ]
            },
        ),
        Check(FINALIZED, "finalized", world="finalized one-sided"),
    )
)

TABLES = [
    Table("CacheManager.pull_cache", {"cache_key": BY_ID, "cache": Of("contiguous")}, PULL_CACHE),
    Table(
        "CacheManager.pull_blocks",
        {
            "src_cache_key": BlocksCacheKey(PEER),
            "dst_cache": Of("blocks"),
            "src_blocks": [0],
            "dst_blocks": [1],
        },
        PULL_BLOCKS,
    ),
    Table(
        "CacheManager.push_cache",
        {"dst_cache_key": BY_ID, "src_cache": Of("contiguous")},
        PUSH_CACHE,
        "one-sided",
    ),
    Table(
        "CacheManager.push_blocks",
        {
            "dst_cache_key": BlocksCacheKey(PEER),
            "src_cache": Of("blocks"),
            "src_blocks": [0],
            "dst_blocks": [1],
        },
        PUSH_BLOCKS,
        "one-sided",
    ),
    Table(
        "CacheManager.transfer_cache_async",
        {
            "src_cache": Of("contiguous"),
            "layer_synchronizer": Always(),
            "transfer_configs": [TransferConfig(PEER, [4096, 8192])],
        },
        ASYNC_TWO_SIDED,
    ),
    Table(
        "CacheManager.transfer_cache_async",
        {
            "src_cache": Of("contiguous"),
            "layer_synchronizer": Always(),
            "transfer_configs": _keyed(range(1)),
        },
        ASYNC_ONE_SIDED,
        "one-sided",
    ),
]


@pytest.mark.parametrize(("table", "world"), cases(TABLES))
def test_checks(worlds: Worlds, table: Table, world: str) -> None:
    verify(table, world, worlds)


# -- what passes the checks ----------------------------------------------------------------------


@pytest.mark.parametrize("empty", [range(2, 1), range(0), range(5, 5)])
def test_an_empty_range_of_a_pull_means_all_layers(worlds: Worlds, empty: range) -> None:
    check = Check(NOT_LINKED, "not linked", {"src_layer_range": empty, "dst_layer_range": empty})
    verify(Table("CacheManager.pull_cache", TABLES[0].good, (check,)), worlds=worlds)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.method)
def test_an_unknown_keyword_is_refused_before_anything_else(worlds: Worlds, table: Table) -> None:
    unknown = Check(
        TypeError, "keyword argument 'no_such_keyword': it takes", {"no_such_keyword": 1}
    )
    for check in (unknown, *table.checks):
        wrong = replace(table, good={**table.good, **check.broken}, checks=(unknown,))
        verify(wrong, table.world, worlds)


@pytest.mark.parametrize(
    "key",
    [CacheKey(PEER, 1), CacheKey(PEER, INVALID_ID, prefix_id=2), CacheKeyByIdAndIndex(PEER, 1)],
)
def test_keys_of_contiguous_caches_pull_into_blocks_without_a_source_list(
    worlds: Worlds, key: Any
) -> None:
    check = Check(NOT_LINKED, "not linked", {"src_cache_key": key, "src_blocks": []})
    verify(Table("CacheManager.pull_blocks", TABLES[1].good, (check,)), worlds=worlds)


def test_a_config_without_a_range_is_given_all_layers(worlds: Worlds) -> None:
    world = worlds.get("two-sided")
    config = TransferConfig(PEER, [4096, 8192])
    task = world.manager.transfer_cache_async(world.contiguous, Always(), [config])
    assert config.src_layer_range == range(1)
    assert task.get_results(10_000) == [NOT_LINKED]
    assert task.synchronize(10_000) is NOT_LINKED

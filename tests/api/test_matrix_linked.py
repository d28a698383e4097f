"""Every check of transfers against a linked peer, in the documented order.

Cluster 1 calls, cluster 2 owns what is pulled from and pushed into. Source of the rows: LLM-DataDist API,
CacheManager.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    LayerSynchronizer,
    LLMException,
    LLMStatusCode,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from tests import nodes
from tests.matrix import INT32, OWN, PEER, SHAPE, Check, Of, Table, calls, refuse
from tests.nodes import Here, Node

Start = Callable[..., Node]
PI = LLMStatusCode.LLM_PARAM_INVALID
UNKNOWN = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
NOT_LINKED = LLMStatusCode.LLM_NOT_YET_LINK
SUCCESS = LLMStatusCode.LLM_SUCCESS
KINDS = {
    "contiguous": ("cache", SHAPE, 2),
    "blocks": ("blocks", SHAPE, 2),
    "odd": ("cache", SHAPE, 3),
    "odd_blocks": ("blocks", SHAPE, 3),
    "wide": ("cache", (2, 300), 2),
    "wide_blocks": ("blocks", (2, 300), 2),
}
"""Caches of both clusters, from the pool, in the order of their ids (from 1)."""
IDS = {name: number for number, name in enumerate(KINDS, 1)}
PRIVATE, PRIVATE_BLOCKS = len(KINDS) + 1, len(KINDS) + 2
"""Ids of caches that are registered without remote access."""


def _prepare(here: Here, cluster: int) -> None:
    manager = here.live.cache_manager
    for name, (kind, shape, tensors) in KINDS.items():
        key = BlocksCacheKey(cluster, IDS[name]) if kind == "blocks" else None
        nodes.make(here, name, kind, list(shape), tensors, key)
    for name, kind in (("private", "cache"), ("private_blocks", "blocks")):
        key = BlocksCacheKey(cluster, PRIVATE_BLOCKS) if kind == "blocks" else None
        nodes.make(here, name, kind, list(SHAPE), 2, key, "numpy", remote_accessible=False)
    here.caches["freed"] = manager.allocate_cache(CacheDesc(2, SHAPE, INT32))
    manager.deallocate_cache(here.caches["freed"])
    here.caches["freed_blocks"] = manager.allocate_blocks_cache(CacheDesc(2, SHAPE, INT32))
    manager.deallocate_blocks_cache(here.caches["freed_blocks"])


def _linked(start: Start, one_sided: bool) -> tuple[Node, Node]:
    caller, owner = (
        start(cluster, enable_remote_cache_accessible=one_sided, pool=1 << 20)
        for cluster in (OWN, PEER)
    )
    for node, cluster in ((caller, OWN), (owner, PEER)):
        node.do(_prepare, cluster)
    nodes.link_pair(caller, owner)
    return caller, owner


def _fill(here: Here, seed: int) -> None:
    for name in here.arrays:
        nodes.fill(here, name, seed)


def _contents(here: Here) -> list[Any]:
    return [array for name in here.arrays for array in nodes.read(here, name)]


def _verify(here: Here, table: Table) -> list[str]:
    """Every call of the table, and the good one at both ends of it; returns what went wrong."""
    method = getattr(here.live.cache_manager, table.method.split(".")[1])

    def made(given: dict[str, Any]) -> dict[str, Any]:
        return {n: here.caches[v.name] if isinstance(v, Of) else v for n, v in given.items()}

    method(**made(dict(table.good)))
    problems = []
    before = _contents(here)
    for _world, broken, number, later in calls(table):
        check = table.checks[number]
        try:
            refuse(method, made({**table.good, **broken}), check)
        except BaseException as error:
            beside = "alone" if later is None else f"with {table.checks[later]}"
            problems.append(f"{check} {beside}: {type(error).__name__} {error}")
    for one, other in zip(before, _contents(here), strict=True):
        np.testing.assert_array_equal(one, other)
    method(**made(dict(table.good)))
    return problems


def _by_id(name: str, slot: int = 0, cluster: int = PEER) -> CacheKeyByIdAndIndex:
    return CacheKeyByIdAndIndex(cluster, IDS[name], slot)


def _first_checks(key: str, cache: str, freed: str, own: Any, nobody: Any) -> tuple[Check, ...]:
    return (
        Check(PI, "which is this engine", {key: own}),
        Check(UNKNOWN, "does not exist", {cache: Of(freed)}),
        Check(NOT_LINKED, "cluster 3 is not linked", {key: nobody}),
    )


def _one_sided(key: str, cache: str, private: str, unknown: Any, closed: Any) -> tuple[Check, ...]:
    return (
        Check(PI, "one-sided mode needs at both", {cache: Of(private)}),
        Check(UNKNOWN, "has no cache for", {key: unknown}),
        Check(PI, "of the owner is not remote accessible", {key: closed}),
    )


PULL_CACHE_LAYOUT = (
    Check(
        PI, "src_layer_range ends", {"src_layer_range": range(1, 2), "dst_layer_range": range(1)}
    ),
    Check(PI, "3 of the owner's 3 tensors", {"cache_key": _by_id("odd")}),
    Check(PI, "is a blocks cache, which cannot be", {"cache_key": _by_id("blocks")}),
    Check(PI, "1200 bytes were asked for", {"cache": Of("wide"), "size": 1200}),
)
PULL_BLOCKS_LAYOUT = (
    Check(
        PI, "src_layer_range ends", {"src_layer_range": range(1, 2), "dst_layer_range": range(1)}
    ),
    Check(PI, "3 of the owner's", {"src_cache_key": BlocksCacheKey(PEER, IDS["odd_blocks"])}),
    Check(PI, "they must be equal", {"src_cache_key": BlocksCacheKey(PEER, IDS["wide_blocks"])}),
    Check(
        PI,
        "src_blocks must list one",
        {"src_cache_key": _by_id("blocks"), "src_blocks": []},
    ),
    Check(TypeError, r"src_blocks\[0\] is -1", {"src_blocks": [-1]}),
    Check(PI, r"src_blocks\[0\] is 2", {"src_blocks": [2]}),
)
PULL_CACHE = {"cache_key": _by_id("contiguous"), "cache": Of("contiguous")}
PULL_BLOCKS = {
    "src_cache_key": BlocksCacheKey(PEER, IDS["blocks"]),
    "dst_cache": Of("blocks"),
    "src_blocks": [0],
    "dst_blocks": [1],
}
PUSH_BLOCKS = {
    "dst_cache_key": BlocksCacheKey(PEER, IDS["blocks"]),
    "src_cache": Of("blocks"),
    "src_blocks": [0],
    "dst_blocks": [1],
}
BY_ID = {"own": _by_id("contiguous", cluster=OWN), "nobody": _by_id("contiguous", cluster=3)}
BY_MODEL = {"own": BlocksCacheKey(OWN), "nobody": BlocksCacheKey(3)}
CLOSED_BLOCKS = BlocksCacheKey(PEER, PRIVATE_BLOCKS)

TWO_SIDED = [
    Table(
        "CacheManager.pull_cache",
        PULL_CACHE,
        (
            *_first_checks("cache_key", "cache", "freed", **BY_ID),
            Check(UNKNOWN, "cache id 99", {"cache_key": CacheKeyByIdAndIndex(PEER, 99)}),
            Check(UNKNOWN, "cache id -1", {"cache_key": CacheKeyByIdAndIndex(PEER, -1)}),
            Check(
                UNKNOWN, "batch_index is 2: .* has 2 slots", {"cache_key": _by_id("contiguous", 2)}
            ),
            Check(UNKNOWN, "req_id 7", {"cache_key": CacheKey(PEER, 7)}),
            Check(UNKNOWN, "prefix_id 7", {"cache_key": CacheKey(PEER, 2**64 - 1, prefix_id=7)}),
            *PULL_CACHE_LAYOUT,
        ),
    ),
    Table(
        "CacheManager.pull_blocks",
        PULL_BLOCKS,
        (
            *_first_checks("src_cache_key", "dst_cache", "freed_blocks", **BY_MODEL),
            Check(UNKNOWN, "model_id 99", {"src_cache_key": BlocksCacheKey(PEER, 99)}),
            *PULL_BLOCKS_LAYOUT,
        ),
    ),
]

PUSH_RANGES = (
    Check(
        PI, "dst_layer_range ends", {"src_layer_range": range(1, 2), "dst_layer_range": range(1, 2)}
    ),
)
ONE_SIDED = [
    Table(
        "CacheManager.pull_cache",
        PULL_CACHE,
        (
            *_first_checks("cache_key", "cache", "freed", **BY_ID),
            *_one_sided(
                "cache_key",
                "cache",
                "private",
                CacheKeyByIdAndIndex(PEER, 99),
                CacheKeyByIdAndIndex(PEER, PRIVATE),
            ),
            *PULL_CACHE_LAYOUT,
        ),
    ),
    Table(
        "CacheManager.pull_blocks",
        PULL_BLOCKS,
        (
            *_first_checks("src_cache_key", "dst_cache", "freed_blocks", **BY_MODEL),
            *_one_sided(
                "src_cache_key",
                "dst_cache",
                "private_blocks",
                BlocksCacheKey(PEER, 99),
                CLOSED_BLOCKS,
            ),
            *PULL_BLOCKS_LAYOUT,
        ),
    ),
    Table(
        "CacheManager.push_cache",
        {"dst_cache_key": _by_id("contiguous"), "src_cache": Of("contiguous")},
        (
            *_first_checks("dst_cache_key", "src_cache", "freed", **BY_ID),
            *_one_sided(
                "dst_cache_key",
                "src_cache",
                "private",
                CacheKeyByIdAndIndex(PEER, 99, 9),
                CacheKeyByIdAndIndex(PEER, PRIVATE, 9),
            ),
            Check(PI, "is a blocks cache: use push_blocks", {"dst_cache_key": _by_id("blocks", 9)}),
            *PUSH_RANGES,
            Check(PI, "batch_index is 2", {"dst_cache_key": _by_id("contiguous", 2)}),
            Check(
                PI,
                "not a multiple of tensor_num_per_layer",
                {"src_cache": Of("odd"), "src_layer_range": range(1), "dst_layer_range": range(1)},
            ),
            Check(
                PI,
                "src_layer_range ends",
                {"src_layer_range": range(1, 2), "dst_layer_range": range(1)},
            ),
            Check(PI, "src_batch_index is 2", {"src_batch_index": 2}),
            Check(PI, "it does not fit", {"src_cache": Of("wide")}),
        ),
    ),
    Table(
        "CacheManager.push_blocks",
        PUSH_BLOCKS,
        (
            *_first_checks("dst_cache_key", "src_cache", "freed_blocks", **BY_MODEL),
            *_one_sided(
                "dst_cache_key",
                "src_cache",
                "private_blocks",
                BlocksCacheKey(PEER, 99),
                CLOSED_BLOCKS,
            ),
            *PUSH_RANGES,
            Check(TypeError, r"dst_blocks\[0\] is -1", {"dst_blocks": [-1]}),
            Check(PI, r"dst_blocks\[0\] is 2", {"dst_blocks": [2]}),
            Check(
                PI,
                "not a multiple of tensor_num_per_layer",
                {
                    "src_cache": Of("odd_blocks"),
                    "src_layer_range": range(1),
                    "dst_layer_range": range(1),
                },
            ),
            Check(
                PI,
                "src_layer_range ends",
                {"src_layer_range": range(1, 2), "dst_layer_range": range(1)},
            ),
            Check(PI, "they must be equal", {"src_cache": Of("wide_blocks")}),
            Check(PI, r"src_blocks\[0\] is 2", {"src_blocks": [2]}),
        ),
    ),
]


@pytest.mark.parametrize("one_sided", [False, True])
def test_checks(start_node: Start, one_sided: bool) -> None:
    caller, owner = _linked(start_node, one_sided)
    caller.do(_fill, 1)
    owner.do(_fill, 1)
    before = owner.do(_contents)
    problems = []
    for table in ONE_SIDED if one_sided else TWO_SIDED:
        problems += caller.do(_verify, table)
    assert not problems, "\n".join(problems)
    touched = owner.do(_contents)
    good = (IDS["contiguous"], IDS["blocks"]) if one_sided else ()  # pushed into, by the good calls
    assert len(before) == len(touched)
    tensors = [
        number for number, (_, _, count) in enumerate(KINDS.values(), 1) for _ in range(count)
    ]
    for number, one, other in zip([*tensors, 0, 0, 0, 0], before, touched, strict=True):
        if number not in good:
            np.testing.assert_array_equal(one, other)


# -- asynchronous transfers: what fails later is a result -------------------------------------------


class Always(LayerSynchronizer):
    """Every layer is final."""

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        """Yes."""
        return True


Sent = tuple[str, Any, dict[str, Any]]


def _send(here: Here, sent: Sent) -> str | None:
    label, config, blocks = sent
    manager = here.live.cache_manager
    try:
        task = manager.transfer_cache_async(here.caches[label], Always(), [config], **blocks)
    except LLMException as error:
        return f"refused: {error.status_code.name}"
    (code,) = task.get_results(20_000)
    assert task.synchronize() is (code or SUCCESS)
    return None if code is None else code.name


def _keyed(key: Any, slot: int = 0, layer: int = 0) -> TransferWithCacheKeyConfig:
    return TransferWithCacheKeyConfig(key, range(1), range(layer, layer + 1), slot)


BOTH: dict[str, Any] = {"src_block_indices": [0], "dst_block_indices": [1]}
SPREAD: dict[str, Any] = {"dst_block_indices": [0], "dst_block_memory_size": 1024}
MODEL = BlocksCacheKey(PEER, IDS["blocks"])
KEYED: list[tuple[Sent, LLMStatusCode]] = [
    (("contiguous", _keyed(_by_id("contiguous", 1), 1), {}), SUCCESS),
    (("blocks", _keyed(MODEL), {}), SUCCESS),
    (("blocks", _keyed(MODEL), BOTH), SUCCESS),
    (("blocks", _keyed(MODEL), {**BOTH, "dst_block_memory_size": 1024}), SUCCESS),
    (("contiguous", _keyed(MODEL), SPREAD), SUCCESS),
    (("contiguous", _keyed(_by_id("contiguous", cluster=3)), {}), NOT_LINKED),
    (("contiguous", _keyed(CacheKeyByIdAndIndex(PEER, 99)), {}), UNKNOWN),
    (("contiguous", _keyed(CacheKeyByIdAndIndex(PEER, PRIVATE)), {}), PI),
    (("contiguous", _keyed(_by_id("contiguous"), layer=1), {}), PI),
    (("contiguous", _keyed(_by_id("contiguous", 2)), {}), PI),
    (("contiguous", _keyed(MODEL), {**SPREAD, "dst_block_indices": [2]}), PI),
    (("blocks", _keyed(MODEL), {**BOTH, "dst_block_indices": [2]}), PI),
    (("blocks", _keyed(BlocksCacheKey(PEER, IDS["wide_blocks"])), BOTH), PI),
    (("blocks", _keyed(BlocksCacheKey(PEER, IDS["wide_blocks"])), {}), PI),
]
"""What the destination decides."""
KEYED_REFUSED: list[tuple[Sent, LLMStatusCode]] = [
    (("freed", _keyed(_by_id("contiguous")), {}), UNKNOWN),
    (("private", _keyed(_by_id("contiguous")), {}), PI),
    (("contiguous", _keyed(_by_id("contiguous"), 2), {}), PI),
    (("contiguous", _keyed(MODEL), {}), PI),
    (("contiguous", _keyed(MODEL), BOTH), PI),
    (("contiguous", _keyed(MODEL), {**SPREAD, "dst_block_memory_size": 0}), PI),
    (("contiguous", _keyed(MODEL), {**SPREAD, "dst_block_memory_size": 2048}), PI),
    (("blocks", _keyed(MODEL), SPREAD), PI),
    (("blocks", _keyed(MODEL), {**BOTH, "dst_block_memory_size": 512}), PI),
    (("blocks", _keyed(MODEL), {**BOTH, "src_block_indices": [2]}), PI),
]
"""What the caller's engine knows at the call."""


def test_results_of_one_sided_layers(start_node: Start) -> None:
    caller, _owner = _linked(start_node, True)
    for sent, status in KEYED:
        assert caller.do(_send, sent) == status.name, sent
    for sent, status in KEYED_REFUSED:
        assert caller.do(_send, sent) == f"refused: {status.name}", sent


def _addresses(here: Here, label: str) -> list[int]:
    return here.caches[label].tensor_addrs


def test_results_of_two_sided_layers(start_node: Start) -> None:
    caller, owner = _linked(start_node, False)
    slots, blocks = owner.do(_addresses, "contiguous"), owner.do(_addresses, "blocks")
    to_slots, to_blocks = TransferConfig(PEER, slots), TransferConfig(PEER, blocks)
    cases: list[tuple[Sent, LLMStatusCode]] = [
        (("contiguous", TransferConfig(PEER, slots, range(1), 1), {}), SUCCESS),
        (("blocks", to_blocks, BOTH), SUCCESS),
        (("blocks", to_blocks, {}), SUCCESS),
        (("contiguous", to_blocks, SPREAD), SUCCESS),
        (("contiguous", TransferConfig(3, slots), {}), NOT_LINKED),
        (("contiguous", TransferConfig(PEER, [4096, 8192]), {}), PI),
        (("contiguous", TransferConfig(PEER, [slots[0], slots[1] + 1028]), {}), PI),
        (("contiguous", to_blocks, {**SPREAD, "dst_block_indices": [1 << 40]}), PI),
    ]
    refused: list[tuple[Sent, LLMStatusCode]] = [
        (("freed", to_slots, {}), UNKNOWN),
        (("contiguous", TransferConfig(OWN, slots), {}), PI),
        (("contiguous", TransferConfig(PEER, slots, None, 2), {}), PI),
        (("contiguous", to_blocks, BOTH), PI),
        (("contiguous", to_blocks, {**SPREAD, "dst_block_memory_size": 2048}), PI),
        (("blocks", to_blocks, SPREAD), PI),
        (("blocks", to_blocks, {**BOTH, "dst_block_memory_size": 512}), PI),
        (("blocks", to_blocks, {**BOTH, "src_block_indices": [2]}), PI),
    ]
    for sent, status in cases:
        assert caller.do(_send, sent) == status.name, sent
    for sent, status in refused:
        assert caller.do(_send, sent) == f"refused: {status.name}", sent

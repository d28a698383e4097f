"""Destinations of one layer-wise transfer that overlap (destinations.py) are refused at the call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKeyByIdAndIndex,
    DataType,
    LLMException,
    LLMStatusCode,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from datadist.api.destinations import check_no_overlap
from datadist.api.layerwise_checks import LayerBlocks
from tests.api.test_layerwise_checks import Always
from tests.matrix import PEER, Worlds, worlds_in

PI = LLMStatusCode.LLM_PARAM_INVALID
NOT_LINKED = LLMStatusCode.LLM_NOT_YET_LINK
NONE = LayerBlocks(None, None, 0)
BLOCK = 16
"""Bytes of a block, or of a slot."""


def _cache(blocks: bool, count: int = 4, size: int = BLOCK) -> Cache:
    return Cache(1, CacheDesc(4, [count, size], DataType.DT_INT8), [1, 2, 3, 4], blocks)


def _refused(cache: Cache, configs: Sequence[Any], blocks: LayerBlocks = NONE) -> str:
    with pytest.raises(LLMException) as caught:
        check_no_overlap(cache, configs, blocks)
    assert caught.value.status_code is PI
    return str(caught.value)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    """One engine at a time, in the state that a case needs."""
    with worlds_in(tmp_path_factory.mktemp("run")) as each:
        yield each


# -- addresses -----------------------------------------------------------------------------------


def test_addresses_that_are_equal_name_both_places() -> None:
    said = _refused(_cache(False), [TransferConfig(2, [4096] * 4)])
    assert said.startswith(
        "transfer_configs[0].dst_addrs[1] is 0x1000, and so is transfer_configs[0].dst_addrs[0]: "
        "give each tensor memory of its own at cluster 2"
    )


@pytest.mark.parametrize("blocks", [False, True])
def test_addresses_that_overlap_name_both_places(blocks: bool) -> None:
    size = 4 * BLOCK if blocks else BLOCK  # whole tensors of a blocks cache
    apart, near = [4096 + 2 * size, 4096], [4096 + 2 * size, 4096 + 3 * size - 1]
    check_no_overlap(_cache(blocks), [TransferConfig(2, [*apart, 4096 + size, 64])], NONE)
    said = _refused(_cache(blocks), [TransferConfig(2, [*near, 64, 1024])])
    assert f"transfer_configs[0].dst_addrs[1] is {near[1]:#x}, and what is written there" in said
    assert f"that of transfer_configs[0].dst_addrs[0], which is {near[0]:#x}:" in said


def test_addresses_of_several_configs() -> None:
    one, other = TransferConfig(2, [64, 128], range(1)), TransferConfig(2, [256, 135], range(1))
    said = _refused(_cache(False), [one, TransferConfig(3, [64, 128], range(1)), other])
    assert "transfer_configs[2].dst_addrs[1] is 0x87" in said
    assert "transfer_configs[0].dst_addrs[1], which is 0x80" in said
    other.dst_addrs = [256, 144]
    check_no_overlap(_cache(False), [one, TransferConfig(3, [64, 128], range(1)), other], NONE)


@pytest.mark.parametrize("kind", [list, tuple, lambda blocks: np.array(blocks, np.uint8)])
def test_blocks_are_compared_as_they_are_written(kind: Any) -> None:
    pairs = LayerBlocks(kind([0, 1]), kind([0, 2]), 0)
    interleaved = [4096, 4096 + BLOCK]  # even blocks of one, odd blocks of the other
    check_no_overlap(_cache(True), [TransferConfig(2, interleaved, range(1))], pairs)
    for second in (4096, 4096 + 1, 4096 + 2 * BLOCK, 4096 + 3 * BLOCK - 1):
        assert "dst_addrs[1]" in _refused(
            _cache(True), [TransferConfig(2, [4096, second], range(1))], pairs
        )
    check_no_overlap(_cache(True), [TransferConfig(2, [4096, 4096 + 3 * BLOCK], range(1))], pairs)


def test_the_last_block_of_a_spread_may_be_short() -> None:
    spread = LayerBlocks(None, [0, 1], 10)  # 16 bytes over blocks of 10: 10 and 6
    check_no_overlap(_cache(False), [TransferConfig(2, [4096, 4096 + 16], range(1))], spread)
    assert "dst_addrs[1]" in _refused(
        _cache(False), [TransferConfig(2, [4096, 4096 + 15], range(1))], spread
    )


def test_keys_and_values_interleaved_layer_by_layer_stay_possible() -> None:
    layers, count, size = 40, 1000, 4096
    desc = CacheDesc(2 * layers, [count, size], DataType.DT_INT8)
    cache = Cache(1, desc, list(range(1, 2 * layers + 1)), True)
    tensor = count * size
    addresses = [1 << 32 | n * tensor for n in range(2 * layers)]
    mixed = [*addresses[::2], *addresses[1::2]]
    lists = LayerBlocks(range(count), range(count - 1, -1, -1), 0)
    for listed in (addresses, mixed):
        for blocks in (NONE, lists):
            check_no_overlap(cache, [TransferConfig(2, listed)], blocks)


def test_addresses_at_the_end_of_all_addresses() -> None:
    top = (1 << 63) - BLOCK
    check_no_overlap(_cache(False), [TransferConfig(2, [top, top - BLOCK], range(1))], NONE)
    assert "0x7ffffffffffffff0" in _refused(
        _cache(False), [TransferConfig(2, [top - 1, top], range(1))]
    )


@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=8),
    st.none() | st.lists(st.integers(0, 6), min_size=1, max_size=4, unique=True),
    st.booleans(),
    st.integers(1, 8),
)
def test_what_is_refused_is_what_is_written_twice(
    addresses: list[int], targets: list[int] | None, pairs: bool, block: int
) -> None:
    slot = BLOCK
    source = [0] * len(targets) if targets is not None and pairs else None
    if targets is not None and not pairs:
        slot = len(targets) * block - block // 2
    size = block if source is not None else slot
    cache = _cache(source is not None, 4, size)
    blocks = LayerBlocks(source, targets, 0 if source is not None or targets is None else block)
    parts = [(0, size)]
    if targets is not None:
        left = block * len(targets) if pairs else slot
        parts = []
        for target in targets:
            parts.append((target * block, min(block, left)))
            left -= block
    written = [a + begin + n for a in addresses for begin, length in parts for n in range(length)]
    configs = [TransferConfig(2, addresses)]
    if len(set(written)) < len(written):
        assert "dst_addrs[" in _refused(cache, configs, blocks)
    else:
        check_no_overlap(cache, configs, blocks)


def test_the_call_refuses_addresses(worlds: Worlds) -> None:
    world = worlds.get("two-sided")
    send = world.manager.transfer_cache_async
    for cache, size in ((world.contiguous, 1024), (world.blocks, 2048)):
        for second in (4096, 4096 + size - 1, 4096 - size + 1):
            with pytest.raises(
                LLMException, match=r"transfer_configs\[0\].dst_addrs\[1\]"
            ) as caught:
                send(cache, Always(), [TransferConfig(PEER, [4096, second])])
            assert caught.value.status_code is PI
        task = send(cache, Always(), [TransferConfig(PEER, [4096, 4096 + size])])
        assert task.get_results(10_000) == [NOT_LINKED]


# -- layers --------------------------------------------------------------------------------------


def _keyed(key: Any, first: int, end: int) -> TransferWithCacheKeyConfig:
    return TransferWithCacheKeyConfig(key, range(end - first), range(first, end))


@pytest.mark.parametrize("kind", ["slots", "blocks"])
def test_layers_of_one_destination(kind: str) -> None:
    cache, key = _cache(kind == "blocks"), CacheKeyByIdAndIndex(2, 7, 1)
    if kind == "blocks":
        same, others = BlocksCacheKey(2, 5), [BlocksCacheKey(2, 6), BlocksCacheKey(3, 5)]
        key = BlocksCacheKey(2, 5)  # type: ignore[assignment]
    else:
        same = CacheKeyByIdAndIndex(2, 7, 1)  # type: ignore[assignment]
        others = [CacheKeyByIdAndIndex(*ids) for ids in ((2, 7, 0), (2, 8, 1), (3, 7, 1))]  # type: ignore[misc]
    for other in (*((each, 0, 2) for each in others), (same, 2, 3)):
        check_no_overlap(cache, [_keyed(key, 0, 2), _keyed(*other)], NONE)
    for first, end in ((0, 2), (1, 2), (1, 4), (0, 1)):
        said = _refused(
            cache, [_keyed(others[0], 0, 2), _keyed(key, 0, 2), _keyed(same, first, end)]
        )
        assert "transfer_configs[1]" in said
        assert "transfer_configs[2]" in said
        assert f"range({first}, {end})" in said


def test_blocks_of_a_cache_by_id_are_one_destination_whatever_the_slot() -> None:
    configs = [_keyed(CacheKeyByIdAndIndex(2, 7, slot), 0, 1) for slot in (0, 1)]
    assert "transfer_configs[1]" in _refused(_cache(False), configs, LayerBlocks(None, [3], BLOCK))
    check_no_overlap(_cache(False), configs, NONE)


def test_the_call_refuses_layers(worlds: Worlds) -> None:
    world = worlds.get("one-sided")
    send = world.manager.transfer_cache_async
    configs = [_keyed(CacheKeyByIdAndIndex(PEER, 1, 1), 0, 1) for _ in range(2)]
    with pytest.raises(LLMException, match=r"transfer_configs\[1\] has dst_layer_range") as caught:
        send(world.contiguous, Always(), configs)
    assert caught.value.status_code is PI
    apart = [_keyed(CacheKeyByIdAndIndex(PEER, 1, slot), 0, 1) for slot in (0, 1)]
    assert send(world.contiguous, Always(), apart).get_results(10_000)[0] is NOT_LINKED

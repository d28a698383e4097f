"""What `transfer_cache_async` refuses at the call beside the rows of the matrix, and what it tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from datadist import (
    CacheKeyByIdAndIndex,
    LayerSynchronizer,
    LLMException,
    LLMStatusCode,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from datadist.api.layerwise_checks import take_blocks
from datadist.transfers.block_lists import Blocks
from tests.matrix import OWN, PEER, Worlds, worlds_in

PI = LLMStatusCode.LLM_PARAM_INVALID
UNKNOWN = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
NOT_LINKED = LLMStatusCode.LLM_NOT_YET_LINK


class Always(LayerSynchronizer):
    """Every layer is final."""

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int) -> bool:
        """Yes."""
        return True


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    """One engine at a time, in the state that a case needs."""
    with worlds_in(tmp_path_factory.mktemp("run")) as each:
        yield each


def _slots(one_sided: bool, slot: int, cluster: int = PEER, layer: int = 0) -> list[Any]:
    """Of one slot, to a layer of the destination."""
    first = 4 + layer * 8192
    two = [TransferConfig(cluster, [first, first + 4096], None, slot)]
    key = CacheKeyByIdAndIndex(cluster, 1)
    keyed = [TransferWithCacheKeyConfig(key, range(1), range(layer, layer + 1), slot)]
    return keyed if one_sided else two


@pytest.mark.parametrize("name", ["two-sided", "one-sided"])
@pytest.mark.parametrize("source", ["contiguous", "blocks"])
def test_a_slot_that_the_source_lacks_is_refused_at_the_call(
    worlds: Worlds, name: str, source: str
) -> None:
    world, one_sided = worlds.get(name), name == "one-sided"
    send, cache = world.manager.transfer_cache_async, getattr(world, source)
    for slot, wrong in ((0, False), (1, source == "blocks"), (2, True), ((1 << 32) - 1, True)):
        configs = [*_slots(one_sided, 0), *_slots(one_sided, slot, layer=1)]
        if wrong:
            with pytest.raises(LLMException, match=f"src_batch_index is {slot}") as caught:
                send(cache, Always(), configs)
            assert caught.value.status_code is PI
        else:
            assert send(cache, Always(), configs).get_results(10_000)[0] is NOT_LINKED


@pytest.mark.parametrize("name", ["two-sided", "one-sided"])
def test_what_the_engine_knows_is_refused_at_the_call(worlds: Worlds, name: str) -> None:
    world, one_sided = worlds.get(name), name == "one-sided"
    send = world.manager.transfer_cache_async
    with pytest.raises(LLMException, match="which is this engine") as caught:
        send(world.contiguous, Always(), _slots(one_sided, 0, OWN))
    assert caught.value.status_code is PI
    with pytest.raises(LLMException, match="does not exist") as caught:
        send(world.freed, Always(), _slots(one_sided, 0))
    assert caught.value.status_code is UNKNOWN


@pytest.mark.parametrize("block", [1 << 53, 1 << 62, (1 << 64) - 1])
def test_blocks_beyond_all_addresses_are_refused_at_the_call(worlds: Worlds, block: int) -> None:
    world = worlds.get("two-sided")
    for blocks in ([block], np.array([block], np.uint64)):
        with pytest.raises(LLMException, match=r"dst_addrs\[0\] is 0x4: \d+ bytes") as caught:
            world.manager.transfer_cache_async(
                world.contiguous, Always(), _slots(False, 0),
                dst_block_indices=blocks, dst_block_memory_size=1024,
            )  # fmt: skip
        assert caught.value.status_code is PI


class Times(LayerSynchronizer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int) -> bool:
        """No layer is final."""
        self.told.append((layer_index, timeout_in_millis))
        return False


@pytest.mark.parametrize("name", ["two-sided", "one-sided"])
def test_a_synchronizer_is_told_the_time_of_a_layer(worlds: Worlds, name: str) -> None:
    world, times = worlds.get(name), Times()
    configs = _slots(name == "one-sided", 0)
    task = world.manager.transfer_cache_async(world.contiguous, times, configs)
    assert task.get_results(10_000) == [PI]
    assert times.told == [(0, 1000)]  # the default of sync_kv_timeout
    assert type(times.told[0][1]) is int


@pytest.mark.parametrize("make", [list, np.array])
def test_a_callers_lists_are_its_own_again_after_the_call(make: Callable[[list[int]], Any]) -> None:
    source, target = make([1, 2]), make([3, 4])
    kept = take_blocks(source, target, None)
    source[0] = target[1] = 9
    assert [_plain(kept.source), _plain(kept.target)] == [[1, 2], [3, 4]]


def _plain(blocks: Blocks | None) -> list[int]:
    assert blocks is not None
    return [int(block) for block in blocks]

"""Keys of one engine that would mean the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from datadist import BlocksCacheKey, CacheDesc, CacheKey, DataType, LLMException, LLMStatusCode
from datadist.api import arguments
from tests.in_process_engine import Engine

INVALID = 2**64 - 1
DESC = CacheDesc(1, [2, 64], DataType.DT_UINT8)


def test_a_placeholder_and_a_blocks_key_of_one_model_are_not_had_together(engine: Engine) -> None:
    manager = engine.api.cache_manager
    blocks = manager.allocate_blocks_cache(DESC, BlocksCacheKey(1, 7))
    taken, free = (CacheKey(1, INVALID, model_id=model) for model in (7, 8))
    with pytest.raises(LLMException, match="placeholder key 1 has model_id 7") as caught:
        manager.allocate_cache(DESC, [free, taken])
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    manager.allocate_cache(DESC, [free])
    manager.deallocate_blocks_cache(blocks)
    manager.allocate_cache(DESC, [taken])


def test_more_registrations_than_a_cache_can_lie_in(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "MAX_CUTS", 3)
    manager = engine.api.cache_manager
    memory = np.zeros(1024, np.uint8)
    address = int(memory.ctypes.data)
    parts = [
        manager.register_cache(CacheDesc(1, [1, 16], DataType.DT_UINT8), [address + 16 + 32 * n])
        for n in range(2)
    ]
    with pytest.raises(LLMException, match="would have 4 places inside of its blocks") as caught:
        manager.register_cache(CacheDesc(1, [4, 32], DataType.DT_UINT8), [address])
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    manager.register_cache(CacheDesc(1, [2, 24], DataType.DT_UINT8), [address])
    for part in parts:
        manager.unregister_cache(part.cache_id)


def test_a_description_without_a_placement_makes_no_cache(engine: Engine) -> None:
    manager = engine.api.cache_manager
    array, nowhere = np.zeros((2, 64), np.uint8), _without_placement()
    before = engine.api.stats()["pools"]["DEVICE"]["pages_used"]
    for call in (
        lambda: manager.register_cache(nowhere, [array]),
        lambda: manager.register_cache(nowhere, [int(array.ctypes.data)]),
        lambda: manager.register_blocks_cache(nowhere, [int(array.ctypes.data)]),
        lambda: manager.allocate_cache(nowhere),
        lambda: manager.allocate_blocks_cache(nowhere),
        lambda: manager.allocate_tensor([4], DataType.DT_UINT8, nowhere.placement),
    ):
        with pytest.raises(TypeError, match="placement is a NoneType"):
            call()
    manager.register_cache(DESC, [array])  # the engine can still be used
    assert engine.api.stats()["pools"]["DEVICE"]["pages_used"] == before
    engine.api.finalize()


def _without_placement() -> CacheDesc:
    nothing: Any = None
    return CacheDesc(1, [2, 64], DataType.DT_UINT8, nothing)

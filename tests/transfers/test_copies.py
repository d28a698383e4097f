"""Copies inside one engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from datadist import (
    Cache,
    CacheDesc,
    DataType,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    MemInfo,
    Memtype,
    Placement,
)
from datadist.api.cache_manager import CacheManager


@pytest.fixture
def manager(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[CacheManager]:
    """The cache manager of an engine with both pools; a parameter gives more options."""
    monkeypatch.setenv("DATADIST_RUNTIME_DIR", str(runtime_dir))
    config = LLMConfig()
    config.enable_cache_manager = True
    config.transfer_backend = "shm"
    config.mem_pool_cfg = config.host_mem_pool_cfg = json.dumps(
        {"memory_size": 1 << 20, "page_shift": 12}
    )
    with LLMDataDist(LLMRole.MIX, 1) as engine:
        engine.init({**config.generate_options(), **getattr(request, "param", {})})
        yield engine.cache_manager


def _filled(cache: Cache, start: int) -> list[NDArray[np.int32]]:
    for index, array in enumerate(cache.numpy()):
        array[:] = np.arange(array.size).reshape(array.shape) + start + 1000 * index
    return [array.copy() for array in cache.numpy()]


def _status(error: pytest.ExceptionInfo[LLMException]) -> LLMStatusCode:
    return error.value.status_code


@pytest.mark.parametrize("placement", list(Placement))
def test_slots(manager: CacheManager, placement: Placement) -> None:
    source = manager.allocate_cache(CacheDesc(2, [3, 10], DataType.DT_INT32))
    target = manager.allocate_cache(CacheDesc(2, [2, 12], DataType.DT_INT32, placement))
    values, expected = _filled(source, 1), _filled(target, 50_000)
    manager.copy_cache(target, source, 1, 2, offset=8, size=16)
    for value, array in zip(values, expected, strict=True):
        array[1, 2:6] = value[2, 2:6]
    np.testing.assert_array_equal(target.numpy(), expected)
    manager.copy_cache(target, source, 0, 1)
    for value, array in zip(values, expected, strict=True):
        array[0, :10] = value[1]
    np.testing.assert_array_equal(target.numpy(), expected)


def test_slots_that_do_not_fit(manager: CacheManager) -> None:
    small = manager.allocate_cache(CacheDesc(2, [3, 10], DataType.DT_INT32))
    large = manager.allocate_cache(CacheDesc(2, [2, 12], DataType.DT_INT32))
    other = manager.allocate_cache(CacheDesc(1, [2, 12], DataType.DT_INT32))
    before = _filled(small, 1)
    wrong: list[tuple[Cache, Cache, dict[str, int]]] = [
        (small, large, {}),
        (large, other, {}),
        (large, small, {"src_batch_index": 3}),
        (large, small, {"dst_batch_index": 2}),
        (large, small, {"offset": 40}),
        (large, small, {"offset": 8, "size": 36}),
        (large, small, {"size": 0}),
    ]
    for dst, src, options in wrong:
        with pytest.raises(LLMException) as error:
            manager.copy_cache(dst, src, **options)
        assert _status(error) is LLMStatusCode.LLM_PARAM_INVALID, options
    np.testing.assert_array_equal(small.numpy(), before)
    manager.deallocate_cache(other)
    with pytest.raises(LLMException) as error:
        manager.copy_cache(large, other)
    assert _status(error) is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST


def test_blocks_are_copied_in_order(manager: CacheManager) -> None:
    cache = manager.allocate_blocks_cache(CacheDesc(2, [8, 10], DataType.DT_INT32))
    expected = _filled(cache, 1)
    manager.copy_blocks(cache, {0: np.array([1, 5]), 1: [2], 7: []})
    for array in expected:
        array[1] = array[5] = array[0]
        array[2] = array[1]
    np.testing.assert_array_equal(cache.numpy(), expected)
    manager.copy_blocks(cache, {})
    for wrong in ({8: [0]}, {0: [8]}, {-1: [0]}):
        with pytest.raises(LLMException) as error:
            manager.copy_blocks(cache, wrong)
        assert _status(error) is LLMStatusCode.LLM_PARAM_INVALID
    with pytest.raises(TypeError):
        manager.copy_blocks(cache, {0: (1, 2)})  # type: ignore[dict-item]
    np.testing.assert_array_equal(cache.numpy(), expected)


# -- what depends on the order, large enough for several threads and stores past the cache -------

MIB = 1 << 20


@pytest.mark.parametrize("order", [1, -1])
def test_large_blocks_are_copied_in_order(manager: CacheManager, order: int) -> None:
    rng = np.random.default_rng(1)
    arrays = [rng.integers(0, 1 << 30, (6, MIB // 4 * 3 + 5), np.int32) for _ in range(2)]
    expected = [array.copy() for array in arrays]
    cache = manager.register_blocks_cache(
        CacheDesc(2, list(arrays[0].shape), DataType.DT_INT32), [a.ctypes.data for a in arrays]
    )
    pairs = [(block, block + 1) for block in range(5)][::order]
    manager.copy_blocks(cache, {source: [target] for source, target in pairs})
    for array in expected:
        for source, target in pairs:
            array[target] = array[source]
    np.testing.assert_array_equal(arrays, expected)


@pytest.mark.parametrize("shift", [1, 16, 1024, MIB])
@pytest.mark.parametrize("up", [True, False])
def test_caches_over_overlapping_memory_are_copied_as_if_by_way_of_a_third(
    manager: CacheManager, shift: int, up: bool
) -> None:
    """Registered ranges may contain each other; here one begins ``shift`` numbers into the other."""
    count = 3 * MIB
    memory = np.random.default_rng(2).integers(0, 1 << 30, count, np.int32)
    outer = manager.register_cache(
        CacheDesc(1, [1, count], DataType.DT_INT32), [memory.ctypes.data]
    )
    inner = manager.register_cache(
        CacheDesc(1, [1, count - shift], DataType.DT_INT32), [memory[shift:].ctypes.data]
    )
    expected = memory.copy()
    if up:
        expected[shift:] = memory[:-shift]
        manager.copy_cache(inner, outer, size=4 * (count - shift))
    else:
        expected[:-shift] = memory[shift:]
        manager.copy_cache(outer, inner)
    np.testing.assert_array_equal(memory, expected)


def test_large_slots_of_one_cache_are_copied(manager: CacheManager) -> None:
    rng = np.random.default_rng(3)
    arrays = [rng.integers(0, 1 << 30, (3, MIB + 3), np.int32) for _ in range(2)]
    expected = [array.copy() for array in arrays]
    cache = manager.register_cache(
        CacheDesc(2, list(arrays[0].shape), DataType.DT_INT32), [a.ctypes.data for a in arrays]
    )
    for source, target, offset in ((0, 1, 0), (1, 2, 4), (2, 0, 8), (1, 1, 0)):
        manager.copy_cache(cache, cache, target, source, offset)
        for array in expected:
            array[target, offset // 4 :] = array[source, offset // 4 :]
    np.testing.assert_array_equal(arrays, expected)


def test_blocks_are_swapped_out_and_in(manager: CacheManager) -> None:
    desc = CacheDesc(2, [8, 10], DataType.DT_INT32)
    cache = manager.allocate_blocks_cache(desc)
    expected = _filled(cache, 1)
    arrays = [np.zeros((4, 10), np.int32) for _ in range(2)]
    host = CacheDesc(2, (4, 10), DataType.DT_INT32, Placement.HOST)
    cpu = Cache.create_cpu_cache(host, [array.ctypes.data for array in arrays])
    manager.swap_blocks(cache, cpu, {0: 3, 1: 2, 5: 0})
    for array, value in zip(arrays, expected, strict=True):
        np.testing.assert_array_equal(array, [value[5], np.zeros(10), value[1], value[0]])
    manager.swap_blocks(cpu, cache, {3: 7})
    for value in expected:
        value[7] = value[0]
    np.testing.assert_array_equal(cache.numpy(), expected)
    manager.swap_blocks(cache, cpu, {})


def test_swaps_that_cannot_be(manager: CacheManager) -> None:
    cache = manager.allocate_blocks_cache(CacheDesc(2, [8, 10], DataType.DT_INT32))
    host = CacheDesc(2, [4, 10], DataType.DT_INT32, Placement.HOST)
    on_host = manager.allocate_blocks_cache(host)
    contiguous = manager.allocate_cache(host)
    other = manager.allocate_blocks_cache(CacheDesc(2, [8, 11], DataType.DT_INT32, Placement.HOST))
    fewer = manager.allocate_blocks_cache(CacheDesc(1, [8, 10], DataType.DT_INT32, Placement.HOST))
    wrong: list[tuple[Cache, Cache, dict[int, int]]] = [
        (contiguous, cache, {}),
        (cache, other, {}),
        (cache, fewer, {}),
        (cache, on_host, {0: 4}),
        (cache, on_host, {8: 0}),
        (cache, cache, {0: 1}),
    ]
    for src, dst, pairs in wrong:
        with pytest.raises(LLMException) as error:
            manager.swap_blocks(src, dst, pairs)
        assert _status(error) is LLMStatusCode.LLM_PARAM_INVALID, (src, dst)
    manager.deallocate_blocks_cache(on_host)
    again = manager.allocate_blocks_cache(host)
    manager.unregister_cache(again.cache_id)  # which leaves the handle as it is
    for freed in (on_host, again):
        with pytest.raises(LLMException) as error:
            manager.swap_blocks(cache, freed, {0: 0})
        assert _status(error) is LLMStatusCode.LLM_PARAM_INVALID


def _of_two_types(manager: CacheManager) -> tuple[Cache, Cache, Cache, Cache]:
    """Contiguous caches of float16 (bytes of 7) and int8, a blocks cache and a CPU cache of these."""
    shape, half = [3, 64], [3, 32]
    float16 = manager.allocate_cache(CacheDesc(2, half, DataType.DT_FLOAT16))
    int8 = manager.allocate_cache(CacheDesc(2, shape, DataType.DT_INT8))
    blocks = manager.allocate_blocks_cache(CacheDesc(2, half, DataType.DT_FLOAT16))
    desc = CacheDesc(2, shape, DataType.DT_INT8, Placement.HOST)
    on_host = manager.allocate_blocks_cache(desc)
    cpu = Cache.create_cpu_cache(desc, list(on_host.tensor_addrs))
    for cache in (float16, blocks):
        for array in cache.numpy():
            array.view(np.uint8)[:] = 7
    return float16, int8, blocks, cpu


def test_types_that_differ_are_said_once(
    manager: CacheManager, caplog: pytest.LogCaptureFixture
) -> None:
    float16, int8, blocks, cpu = _of_two_types(manager)
    manager.swap_blocks(blocks, cpu, {})
    manager.copy_cache(int8, int8, 0, 1)
    assert caplog.messages == []
    for _ in range(2):
        manager.copy_cache(int8, float16)
        manager.swap_blocks(blocks, cpu, {0: 1})
        manager.copy_cache(float16, int8)
        manager.swap_blocks(cpu, blocks, {1: 0})
    assert (int8.numpy()[1][0] == 7).all()
    methods = [message.rpartition("] ")[2].split(":")[0] for message in caplog.messages]
    assert methods == ["copy_cache", "swap_blocks"] * 2
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    copied, swapped = caplog.messages[:2]
    assert "cache 1 of cluster 1, has data_type DT_FLOAT16" in copied
    assert "cache 2 of cluster 1, has data_type DT_INT8" in copied
    assert "a CPU cache, has data_type DT_INT8" in swapped
    assert "peer" not in copied


@pytest.mark.parametrize("manager", [{"datadist.check_types": "1"}], indirect=True)
def test_types_that_differ_are_refused_where_they_are_checked(
    manager: CacheManager, caplog: pytest.LogCaptureFixture
) -> None:
    float16, int8, blocks, cpu = _of_two_types(manager)
    before = [array.copy() for array in int8.numpy()]
    calls: list[Callable[[], None]] = [
        lambda: manager.copy_cache(int8, float16),
        lambda: manager.swap_blocks(blocks, cpu, {0: 1}),
    ]
    for call in calls:
        with pytest.raises(LLMException, match=r"FLOAT16.*INT8.*datadist\.check_types") as error:
            call()
        assert _status(error) is LLMStatusCode.LLM_PARAM_INVALID
    np.testing.assert_array_equal(int8.numpy(), before)
    manager.copy_cache(int8, int8, 0, 1)
    manager.swap_blocks(blocks, cpu, {})
    assert caplog.messages == []


def test_a_cache_keeps_the_shape_that_it_was_made_with(manager: CacheManager) -> None:
    desc = CacheDesc(1, [2, 1024], DataType.DT_INT32)
    cache = manager.allocate_blocks_cache(desc)
    neighbour = manager.allocate_blocks_cache(desc)
    registered = np.zeros((2, 1024), np.int32)
    ours = manager.register_blocks_cache(desc, [registered.ctypes.data])
    array = np.full((4, 1024), 3, np.int32)
    host = CacheDesc(1, [4, 1024], DataType.DT_INT32, Placement.HOST)
    cpu = Cache.create_cpu_cache(host, [array.ctypes.data])
    desc.update_dim(0, 4)  # the description serves for a larger cache next
    host.shape[0] = 9  # type: ignore[index]
    assert cache.cache_desc is desc
    for made in (cache, neighbour, ours):
        assert made.numpy()[0].shape == (2, 1024)
        with pytest.raises(LLMException, match="has 2 blocks") as error:
            manager.swap_blocks(cpu, made, {0: 2})
        assert _status(error) is LLMStatusCode.LLM_PARAM_INVALID
    with pytest.raises(LLMException, match="has 4 blocks"):
        manager.swap_blocks(cpu, cache, {8: 0})
    assert "is_blocks_cache = True" in repr(cache)
    assert manager.allocate_blocks_cache(desc).numpy()[0].shape == (4, 1024)


def test_remapping_is_checked_and_answered(manager: CacheManager) -> None:
    good = MemInfo(Memtype.MEM_TYPE_DEVICE, 4096, 64)
    wrong: list[object] = [
        [],
        (good,),
        [1],
        MemInfo(Memtype.MEM_TYPE_HOST, 4096, 64),
        MemInfo(Memtype.MEM_TYPE_DEVICE, 0, 64),
        MemInfo(Memtype.MEM_TYPE_DEVICE, 4096, 0),
    ]
    for infos in wrong:
        with pytest.raises(LLMException) as error:
            manager.remap_registered_memory(infos)  # type: ignore[arg-type]
        assert _status(error) is LLMStatusCode.LLM_PARAM_INVALID, infos
    with pytest.raises(LLMException) as error:
        manager.remap_registered_memory(good)
    assert _status(error) is LLMStatusCode.LLM_NOT_YET_LINK


@pytest.mark.parametrize(
    ("info", "text"),
    [
        ({0: [5], 1: [5]}, r"copy_block_info\[1\]\[0\] is 5, and so is copy_block_info\[0\]\[0\]"),
        ({0: [4, 5, 5]}, r"copy_block_info\[0\]\[2\] is 5, and so is copy_block_info\[0\]\[1\]"),
        ({0: np.array([5, 5])}, r"copy_block_info\[0\]\[1\] is 5"),
        ({0: np.array([3, 4], np.uint8), 1: [4]}, r"copy_block_info\[1\]\[0\] is 4"),
    ],
)
def test_no_block_is_written_twice(
    manager: CacheManager, info: dict[int, list[int]], text: str
) -> None:
    cache = manager.allocate_blocks_cache(CacheDesc(2, [6, 10], DataType.DT_INT32))
    before = _filled(cache, 1)
    with pytest.raises(LLMException, match=text) as caught:
        manager.copy_blocks(cache, info)
    assert _status(caught) is LLMStatusCode.LLM_PARAM_INVALID
    assert ": list each destination block once" in str(caught.value)
    np.testing.assert_array_equal(cache.numpy(), before)


def test_a_block_may_be_copied_on_in_one_call(manager: CacheManager) -> None:
    cache = manager.allocate_blocks_cache(CacheDesc(2, [6, 10], DataType.DT_INT32))
    expected = _filled(cache, 1)
    manager.copy_blocks(cache, {0: [1, 2], 1: [3], 3: [4], 5: [0]})
    for array in expected:
        array[1] = array[2] = array[3] = array[4] = array[0]
        array[0] = array[5]
    np.testing.assert_array_equal(cache.numpy(), expected)


def test_no_block_is_swapped_in_twice(manager: CacheManager) -> None:
    ours = manager.allocate_blocks_cache(CacheDesc(2, [6, 10], DataType.DT_INT32))
    host = manager.allocate_blocks_cache(CacheDesc(2, [6, 10], DataType.DT_INT32, Placement.HOST))
    before, _ = _filled(host, 7), _filled(ours, 1)
    with pytest.raises(
        LLMException, match=r"src_to_dst\[2\] is 1, and so is src_to_dst\[0\]"
    ) as caught:
        manager.swap_blocks(ours, host, {0: 1, 1: 3, 2: 1})
    assert _status(caught) is LLMStatusCode.LLM_PARAM_INVALID
    assert ": list each destination block once" in str(caught.value)
    np.testing.assert_array_equal(host.numpy(), before)

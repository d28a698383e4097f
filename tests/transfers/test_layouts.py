"""Transfers between caches whose blocks lie apart, or whose layers are one tensor, at either end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LayerSynchronizer,
    LLMException,
    Placement,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from tests import nodes
from tests.nodes import Here, Node

Start = Callable[..., Node]
LAYERS, BLOCKS, WIDTH = 4, 6, 8
"""Tensors, blocks of each, and int32 of a block."""
BYTES = 4 * WIDTH


class _Now(LayerSynchronizer):
    def synchronize_layer(self, layer_index: int, timeout_in_millis: int) -> bool:
        return True


def _make(
    here: Here, label: str, layout: str, kind: str = "blocks", key: Any = None, per_layer: int = 2,
    extra: int = 0,
) -> list[int]:  # fmt: skip
    """A cache that is "dense", or "apart": layers interleaved in one buffer; its addresses."""
    stride = LAYERS * BYTES + 4 * extra
    shared: int | None
    if layout == "apart":
        # the last block of the last layer ends the memory, and the gaps are watched
        buffer = np.full(BLOCKS * stride // 4 - extra, nodes.EDGE, np.int32)
        addresses = [int(buffer.ctypes.data) + n * BYTES for n in range(LAYERS)]
        shared = stride
        here.any.setdefault("gaps", []).append((buffer, stride // 4, LAYERS * WIDTH))
    else:
        arrays = [np.zeros((BLOCKS, WIDTH), np.int32) for _ in range(LAYERS)]
        here.any.setdefault("kept", []).append(arrays)
        addresses, shared = [int(each.ctypes.data) for each in arrays], None
    desc = CacheDesc(
        LAYERS, [BLOCKS, WIDTH], DataType.DT_INT32, tensors_per_layer=per_layer, block_stride=shared
    )
    manager = here.live.cache_manager
    make = manager.register_blocks_cache if kind == "blocks" else manager.register_cache
    cache = make(desc, addresses) if key is None else make(desc, addresses, key)
    here.caches[label], here.arrays[label] = cache, cache.numpy()
    nodes.clear(here, label)
    return addresses


def _read(here: Here, label: str) -> list[Any]:
    for buffer, period, used in here.any.get("gaps", ()):
        whole = np.append(buffer, np.full(-len(buffer) % period, nodes.EDGE, np.int32))
        assert (whole.reshape(-1, period)[:, used:] == nodes.EDGE).all(), "written between blocks"
    return [array.copy() for array in here.arrays[label]]


def _send(here: Here, label: str, configs: list[Any], *blocks: Any) -> str:
    task = here.live.cache_manager.transfer_cache_async(
        here.caches[label], _Now(), configs, *blocks
    )
    return task.synchronize(60_000).name


def _pattern(seed: int) -> list[Any]:
    return [nodes.pattern(seed, n, (BLOCKS, WIDTH)) for n in range(LAYERS)]


def _pair(start_node: Start, one_sided: bool) -> tuple[Node, Node]:
    options = {"pool": 0, "enable_remote_cache_accessible": one_sided}
    return start_node(1, **options), start_node(2, **options)


def _check(node: Node, label: str, expected: list[Any]) -> None:
    for mine, theirs in zip(node.do(_read, label), expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def _moved(seed: int, source: list[int], target: list[int], tensors: range) -> list[Any]:
    expected = [np.zeros((BLOCKS, WIDTH), np.int32) for _ in range(LAYERS)]
    for n in tensors:
        expected[n][target] = _pattern(seed)[n][source]
    return expected


LAYOUTS = ("dense", "apart")


@pytest.mark.parametrize("one_sided", [False, True])
def test_blocks_are_pulled_and_pushed_between_all_layouts(
    start_node: Start, one_sided: bool
) -> None:
    owner, user = _pair(start_node, one_sided)
    for number, layout in enumerate(LAYOUTS):
        owner.do(_make, layout, layout, "blocks", BlocksCacheKey(1, number), 1, 3)
        owner.do(nodes.fill, layout, 1 + number)
        user.do(_make, layout, layout, "blocks", None, 1)
    nodes.link_pair(owner, user)
    for number, _theirs in enumerate(LAYOUTS):
        key = BlocksCacheKey(1, number)
        for mine in LAYOUTS:
            for _ in range(2):  # the second time over a cached route
                user.do(nodes.clear, mine)
                user.do(nodes.pull_blocks, key, mine, [1, 5], [0, 5])
                _check(user, mine, _moved(1 + number, [1, 5], [0, 5], range(LAYERS)))
            user.do(nodes.clear, mine)
            every = list(range(BLOCKS))
            user.do(nodes.pull_blocks, key, mine, every, every[::-1])
            _check(user, mine, _moved(1 + number, every, every[::-1], range(LAYERS)))
            user.do(nodes.clear, mine)
            some: Any = {"src_layer_range": range(1, 3), "dst_layer_range": range(1, 3)}
            user.do(nodes.pull_blocks, key, mine, [2, 3], [3, 4], **some)
            _check(user, mine, _moved(1 + number, [2, 3], [3, 4], range(1, 3)))
    if one_sided:
        _push_everywhere(owner, user)


def _push_everywhere(owner: Node, user: Node) -> None:
    for number, theirs in enumerate(LAYOUTS):
        key = BlocksCacheKey(1, number)
        for seed, mine in enumerate(LAYOUTS, 20):
            user.do(nodes.fill, mine, seed)
            for _ in range(2):
                owner.do(nodes.clear, theirs)
                user.do(nodes.push_blocks, key, mine, [0, 5], [5, 1])
                _check(owner, theirs, _moved(seed, [0, 5], [5, 1], range(LAYERS)))
            owner.do(nodes.clear, theirs)
            some: Any = {"src_layer_range": range(1, 2), "dst_layer_range": range(1, 2)}
            user.do(nodes.push_blocks, key, mine, [2, 3], [3, 4], **some)
            _check(owner, theirs, _moved(seed, [2, 3], [3, 4], range(1, 2)))


@pytest.mark.parametrize("one_sided", [False, True])
def test_slots_move_between_all_layouts(start_node: Start, one_sided: bool) -> None:
    owner, user = _pair(start_node, one_sided)
    for number, layout in enumerate(LAYOUTS):
        keys = [CacheKey(1, 10 * number + slot) for slot in range(BLOCKS)]
        owner.do(_make, layout, layout, "cache", keys)
        owner.do(nodes.fill, layout, 1 + number)
        user.do(_make, layout, layout, "cache")
        user.do(_make, f"blocks {layout}", layout)
    nodes.link_pair(owner, user)
    for number, theirs in enumerate(LAYOUTS):
        key = CacheKeyByIdAndIndex(1, 1 + number, 5)
        for mine in LAYOUTS:
            user.do(nodes.clear, mine)
            user.do(nodes.pull_cache, key, mine, 4)
            _check(user, mine, _moved(1 + number, [5], [4], range(LAYERS)))
            user.do(nodes.pull_blocks, key, f"blocks {mine}", [], [5])
            _check(user, f"blocks {mine}", _moved(1 + number, [5], [5], range(LAYERS)))
            if one_sided:
                user.do(nodes.fill, mine, 30 + number)
                owner.do(nodes.clear, theirs)
                user.do(nodes.push_cache, key, mine, 2)
                _check(owner, theirs, _moved(30 + number, [2], [5], range(LAYERS)))
                owner.do(nodes.fill, theirs, 1 + number)


@pytest.mark.parametrize("one_sided", [False, True])
def test_layers_are_sent_between_all_layouts(start_node: Start, one_sided: bool) -> None:
    owner, user = _pair(start_node, one_sided)
    addresses: dict[str, list[int]] = {}
    for number, layout in enumerate(LAYOUTS):
        addresses[layout] = owner.do(
            _make, layout, layout, "blocks", BlocksCacheKey(1, number), 1, 3
        )
        user.do(_make, layout, layout, "blocks", None, 1)
        user.do(nodes.fill, layout, 40 + number)
    nodes.link_pair(owner, user)
    for number, theirs in enumerate(LAYOUTS):
        for seed, mine in enumerate(LAYOUTS, 40):
            config = (
                TransferWithCacheKeyConfig(BlocksCacheKey(1, number), range(1, 3), range(1, 3))
                if one_sided
                else TransferConfig(1, addresses[theirs][1:3], range(1, 3))
            )
            for blocks in ((), ([0, 3], [5, 0])):
                owner.do(nodes.clear, theirs)
                assert user.do(_send, mine, [config], *blocks) == "LLM_SUCCESS"
                source, target = blocks or (list(range(BLOCKS)),) * 2
                _check(owner, theirs, _moved(seed, source, target, range(1, 3)))


@pytest.mark.parametrize("one_sided", [False, True])
def test_a_slot_is_sent_over_blocks_that_lie_apart(start_node: Start, one_sided: bool) -> None:
    owner, user = _pair(start_node, one_sided)
    addresses = owner.do(_make, "apart", "apart", "blocks", BlocksCacheKey(1))
    user.do(_make, "slots", "apart", "cache")
    user.do(nodes.fill, "slots", 50)
    nodes.link_pair(owner, user)
    config = (
        TransferWithCacheKeyConfig(BlocksCacheKey(1), range(2), range(2), 0)
        if one_sided
        else TransferConfig(1, addresses, range(2), 0)
    )
    assert user.do(_send, "slots", [config], None, [3], BYTES) == "LLM_SUCCESS"
    _check(owner, "apart", _moved(50, [0], [3], range(LAYERS)))


def _same_begin(here: Here) -> int:
    """Two caches that begin at one address, whose blocks lie differently far apart."""
    memory = here.any.setdefault("memory", np.zeros(4096, np.int32))
    for stride in (2 * BYTES, 3 * BYTES):
        desc = CacheDesc(2, [BLOCKS, WIDTH], DataType.DT_INT32, block_stride=stride)
        address = int(memory.ctypes.data)
        here.live.cache_manager.register_blocks_cache(desc, [address, address + BYTES])
    return int(memory.ctypes.data)


def test_addresses_that_do_not_tell_how_far_apart_blocks_lie(start_node: Start) -> None:
    owner, user = _pair(start_node, False)
    apart = owner.do(_make, "apart", "apart")
    both = owner.do(_same_begin)
    user.do(_make, "mine", "dense", "blocks", None, 1)
    nodes.link_pair(owner, user)
    text = user.do(_error, _send, "mine", [TransferConfig(1, [both], range(1))], [0], [1])
    assert f"lie {2 * BYTES} and {3 * BYTES} bytes apart" in text
    second_block = [apart[0] + LAYERS * BYTES]
    config = TransferConfig(1, second_block, range(1))
    assert user.do(_send, "mine", [config], [0], [1]) == "LLM_PARAM_INVALID"
    _check(owner, "apart", _moved(0, [], [], range(0)))


def _error(here: Here, function: Any, *args: Any) -> str:
    with pytest.raises(LLMException) as caught:
        function(here, *args)
    return f"{caught.value}"


@pytest.mark.parametrize("one_sided", [False, True])
def test_both_ends_must_agree_on_the_tensors_of_a_layer(start_node: Start, one_sided: bool) -> None:
    owner, user = _pair(start_node, one_sided)
    owner.do(_make, "theirs", "dense", "blocks", BlocksCacheKey(1), 2)
    user.do(_make, "mine", "apart", "blocks", None, 1)
    nodes.link_pair(owner, user)
    text = user.do(_error, nodes.pull_blocks, BlocksCacheKey(1), "mine", [0], [0])
    assert "1 tensors per layer and cache 1 of cluster 1 2" in text
    assert "LLM_PARAM_INVALID" in text
    user.do(_pull_named, "mine")
    text = user.do(_error, nodes.pull_blocks, BlocksCacheKey(1), "mine", [0], [0])
    assert "tensors per layer" in text, "also where a named number has found a route"
    if one_sided:
        text = user.do(_error, nodes.push_blocks, BlocksCacheKey(1), "mine", [0], [0])
        assert "tensors per layer" in text
        config = TransferWithCacheKeyConfig(BlocksCacheKey(1), range(1), range(1))
        assert user.do(_send, "mine", [config]) == "LLM_PARAM_INVALID"


def _pull_named(here: Here, label: str) -> None:
    for number in (1, 2):
        nodes.pull_blocks(
            here, BlocksCacheKey(1), label, [0], [0], tensor_num_per_layer=number,
            src_layer_range=range(2), dst_layer_range=range(2),
        )  # fmt: skip
        nodes.pull_blocks(here, BlocksCacheKey(1), label, [0], [0], tensor_num_per_layer=number)


def _register_parts(here: Here, model: int, first: int, blocks: int) -> int:
    """A cache over some blocks of memory that other caches have in part."""
    memory = here.any.setdefault("memory", np.arange(4096, dtype=np.int32))
    cache = here.live.cache_manager.register_blocks_cache(
        CacheDesc(1, [blocks, WIDTH], DataType.DT_INT32, tensors_per_layer=1),
        [int(memory.ctypes.data) + 4 * first],
        BlocksCacheKey(1, model),
        True,
    )
    here.caches[str(model)], here.arrays[str(model)] = cache, cache.numpy()
    return first


@pytest.mark.parametrize("one_sided", [False, True])
def test_caches_that_share_memory_in_part(start_node: Start, one_sided: bool) -> None:
    """Also where a block lies in what two registrations have."""
    owner, user = _pair(start_node, one_sided)
    firsts = [
        owner.do(_register_parts, model, first, blocks)
        for model, (first, blocks) in enumerate(
            ((100, 5), (83, 20), (100, 5), (204, 30), (0, 100), (90, 2))
        )
    ]
    for model in range(2):
        user.do(_register_parts, 10 + model, (64, 67)[model], 12)
    nodes.link_pair(owner, user)
    gone = (1, 4, 0)
    for removed in (None, *gone):
        if removed is not None:
            owner.do(nodes.unregister, str(removed))
        left = [
            n
            for n in range(6)
            if n not in gone[: gone.index(removed) + 1 if removed is not None else 0]
        ]
        for model in left:
            for mine in ("10", "11"):
                user.do(nodes.clear, mine)
                user.do(nodes.pull_blocks, BlocksCacheKey(1, model), mine, [0, 1], [3, 2])
                (array,) = user.do(nodes.read, mine)
                first = firsts[model]
                np.testing.assert_array_equal(
                    array[[3, 2]].ravel(), np.arange(first, first + 2 * WIDTH)
                )
        if one_sided and removed is None:
            user.do(nodes.fill, "10", 60)
            user.do(nodes.push_blocks, BlocksCacheKey(1, 4), "10", [1, 2, 3], [97, 98, 12])
            (array,) = owner.do(nodes.read, "4")
            np.testing.assert_array_equal(
                array[[97, 98, 12]], nodes.pattern(60, 0, (12, WIDTH))[[1, 2, 3]]
            )
            owner.do(_renumber)


def _renumber(here: Here) -> None:
    here.any["memory"][:] = np.arange(4096)


def test_memory_in_which_a_cache_goes_on_cannot_be_read_by_its_old_key(start_node: Start) -> None:
    owner, user = _pair(start_node, False)
    owner.do(_register_parts, 0, 0, 10)
    owner.do(_register_parts, 1, 40, 10)
    user.do(_register_parts, 10, 0, 12)
    nodes.link_pair(owner, user)
    owner.do(nodes.unregister, "0")
    text = user.do(_error, nodes.pull_blocks, BlocksCacheKey(1, 0), "10", [0], [0])
    assert "LLM_KV_CACHE_NOT_EXIST" in text


def _copies(here: Here) -> None:
    """Inside one engine: between slots and blocks, host and device."""
    manager = here.live.cache_manager
    for label in LAYOUTS:
        nodes.fill(here, label, 1)
        manager.copy_blocks(here.caches[label], {5: [0], 0: [4]})
        expected = _pattern(1)
        for array in expected:
            array[0], array[4] = array[5], array[5]
        for mine, theirs in zip(_read(here, label), expected, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    buffer = np.zeros((BLOCKS, 2 * WIDTH * LAYERS), np.int32)
    addresses = [int(buffer.ctypes.data) + n * BYTES for n in range(LAYERS)]
    cpu = Cache.create_cpu_cache(
        CacheDesc(
            LAYERS, [BLOCKS, WIDTH], DataType.DT_INT32, Placement.HOST,
            block_stride=2 * BYTES * LAYERS,
        ),
        addresses,
    )  # fmt: skip
    for label in LAYOUTS:
        nodes.fill(here, label, 2)
        manager.swap_blocks(here.caches[label], cpu, {5: 1, 0: 5})
        manager.swap_blocks(cpu, here.caches[label], {1: 2})
        for tensor, theirs, saved in zip(_read(here, label), _pattern(2), cpu.numpy(), strict=True):
            np.testing.assert_array_equal(saved[[1, 5]], theirs[[5, 0]])
            np.testing.assert_array_equal(tensor[2], theirs[5])
    slots = [here.caches[f"slots {label}"] for label in LAYOUTS]
    for source, target in ((0, 1), (1, 0)):
        nodes.fill(here, f"slots {LAYOUTS[source]}", 3)
        nodes.clear(here, f"slots {LAYOUTS[target]}")
        manager.copy_cache(slots[target], slots[source], 5, 4, offset=8)
        for tensor, theirs in zip(
            _read(here, f"slots {LAYOUTS[target]}"), _pattern(3), strict=True
        ):
            assert tensor[5].tolist() == [0, 0, *theirs[4][2:]]


def test_copies_inside_an_engine_know_layouts(start_node: Start) -> None:
    node = start_node(1, pool=0)
    for layout in LAYOUTS:
        node.do(_make, layout, layout)
        node.do(_make, f"slots {layout}", layout, "cache")
    node.do(_copies)


def _allocate_apart(here: Here) -> None:
    desc = CacheDesc(2, [3, WIDTH], DataType.DT_INT32, block_stride=5 * BYTES)
    cache = here.live.cache_manager.allocate_blocks_cache(desc, BlocksCacheKey(1))
    here.caches["pool"], here.arrays["pool"] = cache, cache.numpy()
    assert cache.numpy()[0].strides == (5 * BYTES, 4)
    nodes.fill(here, "pool", 9)


def test_blocks_of_a_pool_may_lie_apart(start_node: Start) -> None:
    owner, user = start_node(1), start_node(2)
    owner.do(_allocate_apart)
    user.do(nodes.make, "mine", "blocks", [3, WIDTH], 2)
    nodes.link_pair(owner, user)
    user.do(nodes.pull_blocks, BlocksCacheKey(1), "mine", [2, 1, 0], [0, 1, 2])
    for n, array in enumerate(user.do(nodes.read, "mine")):
        np.testing.assert_array_equal(array[::-1], nodes.pattern(9, n, (3, WIDTH)))


@pytest.mark.parametrize("stride", [-8, 0, BYTES - 4, BYTES + 2])
def test_strides_that_no_blocks_have(stride: int) -> None:
    with pytest.raises(LLMException, match=f"block_stride is {stride}"):
        CacheDesc(1, [2, WIDTH], DataType.DT_INT32, block_stride=stride)


def test_a_checksum_is_compared_over_blocks_that_lie_apart(start_node: Start) -> None:
    owner, user = start_node(1, pool=0), start_node(2, pool=0)
    owner.do(_make, "apart", "apart", "blocks", BlocksCacheKey(1))
    owner.do(nodes.fill, "apart", 7)
    user.do(_restart_with_checksums)
    user.do(_make, "mine", "apart")
    nodes.link_pair(owner, user)
    user.do(nodes.pull_blocks, BlocksCacheKey(1), "mine", [5, 2], [0, 5])
    _check(user, "mine", _moved(7, [5, 2], [0, 5], range(LAYERS)))


def _restart_with_checksums(here: Here) -> None:
    here.live.finalize()
    here.live.init({**here.any["options"], "datadist.checksum": "1"})

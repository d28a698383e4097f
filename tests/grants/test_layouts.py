"""Grants of blocks that lie apart, of memory that caches share, and of tensors over pools."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from datadist import CacheDesc, CacheKey, DataType
from tests import background, nodes
from tests.grants import world as grants
from tests.grants.world import GONE, Start
from tests.nodes import Here, Node

LAYERS, BLOCKS, WIDTH = 4, 6, 8
"""Tensors, blocks of each, and int32 of a block."""
BYTES = 4 * WIDTH
ROW = LAYERS * BYTES + 12
"""Bytes from one block to the next where layers are interleaved, with a gap behind the last one."""
KINDS = ("pool", "pool apart", "dense", "apart", "shared", "tensor")
GRANTED = [5, 2, 0, 3]
MODES = pytest.mark.parametrize("one_sided", [False, True])


def _desc(per_layer: int, stride: int | None = None) -> CacheDesc:
    return CacheDesc(
        LAYERS, [BLOCKS, WIDTH], DataType.DT_INT32, tensors_per_layer=per_layer, block_stride=stride
    )


def _make(here: Here, kind: str, label: str, per_layer: int = 1) -> None:
    """A cache of one of the kinds."""
    manager, one_sided = here.live.cache_manager, here.any["one sided"]
    if kind.startswith("pool"):
        desc = _desc(per_layer, 3 * BYTES if kind == "pool apart" else None)
        cache = manager.allocate_blocks_cache(desc)
    elif kind == "tensor":
        tensors = [
            manager.allocate_tensor([BLOCKS, WIDTH], DataType.DT_INT32) for _ in range(LAYERS)
        ]
        cache = manager.register_blocks_cache(_desc(per_layer), tensors)
    else:
        addresses, stride = _memory(here, kind, one_sided)
        cache = manager.register_blocks_cache(
            _desc(per_layer, stride), addresses, remote_accessible=one_sided or None
        )
    here.caches[label], here.arrays[label] = cache, cache.numpy()
    nodes.clear(here, label)


def _memory(here: Here, kind: str, one_sided: bool) -> tuple[list[int], int | None]:
    """Addresses of registered memory, and how far apart its blocks begin."""
    if kind == "apart":
        buffer = np.full(BLOCKS * ROW // 4 - 3, nodes.EDGE, np.int32)
        here.any.setdefault("gaps", []).append(buffer)
        return [int(buffer.ctypes.data) + number * BYTES for number in range(LAYERS)], ROW
    buffer = np.zeros(LAYERS * BLOCKS * WIDTH, np.int32)
    here.any.setdefault("kept", []).append(buffer)
    first = int(buffer.ctypes.data)
    if (
        kind == "shared"
    ):  # other registrations begin and end inside of blocks of the first and third layer
        for layer in (0, 2):
            here.live.cache_manager.register_blocks_cache(
                CacheDesc(1, [3, WIDTH], DataType.DT_INT32, tensors_per_layer=1),
                [first + layer * BLOCKS * BYTES + BYTES // 2],
                remote_accessible=one_sided or None,
            )
    return [first + layer * BLOCKS * BYTES for layer in range(LAYERS)], None


def _start(start: Start, one_sided: bool, *clusters: int) -> list[Node]:
    started = [start(number, enable_remote_cache_accessible=one_sided) for number in clusters]
    for node in started:
        node.do(_note_mode, one_sided)
    return started


def _note_mode(here: Here, one_sided: bool) -> None:
    here.any["one sided"] = one_sided


def _pull(here: Here, label: str, dst: list[int], src: Any = (), **options: Any) -> None:
    nodes.clear(here, label)
    here.live.cache_manager.pull_blocks(CacheKey(1, 7), here.caches[label], src, dst, **options)


def _outcome(here: Here, label: str, *args: Any, **options: Any) -> str:
    return background.outcome(lambda: _pull(here, label, *args, **options))


def _read(here: Here, label: str) -> list[Any]:
    for buffer in here.any.get("gaps", ()):
        whole = np.append(buffer, np.full(3, nodes.EDGE, np.int32)).reshape(BLOCKS, ROW // 4)
        assert (whole[:, LAYERS * WIDTH :] == nodes.EDGE).all(), "written between blocks"
    return [array.copy() for array in here.arrays[label]]


def _check(
    reader: Node, label: str, seed: int, source: list[int], target: list[int], layers: range
) -> None:
    for number, array in enumerate(reader.do(_read, label)):
        expected = np.zeros((BLOCKS, WIDTH), np.int32)
        if number in layers:
            expected[target] = nodes.pattern(seed, number, (BLOCKS, WIDTH))[source]
        np.testing.assert_array_equal(array, expected, f"{label}, tensor {number}")


@MODES
def test_grants_are_pulled_between_all_layouts(start_node: Start, one_sided: bool) -> None:
    owner, reader = _start(start_node, one_sided, 1, 2)
    for seed, kind in enumerate(KINDS):
        for node in (owner, reader):
            node.do(_make, kind, kind)
        owner.do(nodes.fill, kind, seed)
    grants.link(owner, reader)
    for seed, theirs in enumerate(KINDS):
        for mine in KINDS:
            _between(owner, reader, seed, theirs, mine)
        token = owner.do(grants.grant, GRANTED, label=theirs)
        owner.do(grants.revoke)
        owner.do(_refill, theirs, seed)
        assert reader.do(_outcome, mine, [1, 0, 5, 4], token=token) == GONE


def _refill(here: Here, label: str, seed: int) -> None:
    """Other bytes, and those of before."""
    nodes.fill(here, label, 77)
    nodes.fill(here, label, seed)


def _between(owner: Node, reader: Node, seed: int, theirs: str, mine: str) -> None:
    owner.do(grants.grant, GRANTED, label=theirs)
    some: Any = {"src_layer_range": range(1, 3), "dst_layer_range": range(1, 3)}
    reader.do(_pull, mine, [5, 0], [3, 1], **some)
    _check(reader, mine, seed, [3, 2], [5, 0], range(1, 3))
    assert owner.do(grants.state) == "GRANTED"
    reader.do(_pull, mine, [1, 0, 5, 4])
    _check(reader, mine, seed, GRANTED, [1, 0, 5, 4], range(LAYERS))
    assert owner.do(grants.wait) == "CONSUMED"
    token = owner.do(grants.grant, list(range(BLOCKS)), label=theirs)
    reader.do(_pull, mine, list(range(BLOCKS)), token=token)
    _check(reader, mine, seed, list(range(BLOCKS)), list(range(BLOCKS)), range(LAYERS))
    assert owner.do(grants.wait) == "CONSUMED"


@MODES
def test_layouts_that_do_not_fit_are_refused(start_node: Start, one_sided: bool) -> None:
    owner, reader = _start(start_node, one_sided, 1, 2)
    owner.do(_make, "apart", "apart", 2)
    owner.do(nodes.fill, "apart", 1)
    reader.do(_make, "dense", "dense", 1)
    reader.do(_make_wide, "wide")
    grants.link(owner, reader)
    token = owner.do(grants.grant, GRANTED, label="apart")
    target = [0, 1, 2, 3]
    for known in (token, None):
        assert reader.do(_outcome, "dense", target, token=known) == "LLM_PARAM_INVALID"
        assert reader.do(_outcome, "wide", target, token=known) == "LLM_PARAM_INVALID"
    assert owner.do(grants.state) == "GRANTED"
    named: Any = {"tensor_num_per_layer": 2}
    layers: Any = {"src_layer_range": range(1, 2), "dst_layer_range": range(1, 2)}
    assert reader.do(_outcome, "dense", target, token=token, **named, **layers) == "OK"
    _check(reader, "dense", 1, GRANTED, target, range(2, 4))
    assert reader.do(_outcome, "dense", target, token=token, **named) == "OK"
    assert owner.do(grants.wait) == "CONSUMED"


def _make_wide(here: Here, label: str) -> None:
    """Blocks that begin as far apart as those of the owner, and are larger."""
    desc = CacheDesc(
        LAYERS, [BLOCKS, ROW // 4], DataType.DT_INT32, tensors_per_layer=2, block_stride=ROW
    )
    cache = here.live.cache_manager.allocate_blocks_cache(desc)
    here.caches[label], here.arrays[label] = cache, cache.numpy()


@MODES
@pytest.mark.parametrize("kind", ["shared", "tensor", "apart"])
def test_the_end_of_a_cache_ends_the_grants_of_its_memory(
    start_node: Start, one_sided: bool, kind: str
) -> None:
    """Also where another cache goes on over the same memory."""
    owner, reader = _start(start_node, one_sided, 1, 2)
    owner.do(_make, kind, kind)
    owner.do(nodes.fill, kind, 1)
    owner.do(_make_again, kind, "beside")
    reader.do(_make, "apart", "mine")
    grants.link(owner, reader)
    token = owner.do(grants.grant, GRANTED, label=kind)
    beside = owner.do(grants.grant, GRANTED, 8, "beside")
    reader.do(_pull, "mine", [0], [0], token=token)
    owner.do(nodes.unregister, kind)
    assert owner.do(grants.wait) == "REVOKED"
    assert reader.do(_outcome, "mine", [0, 1, 2, 3], token=token) == GONE
    assert owner.do(grants.state, 8) == "GRANTED"
    reader.do(_pull_of, "mine", 8, beside)
    _check(reader, "mine", 1, GRANTED, [0, 1, 2, 3], range(LAYERS))


def _make_again(here: Here, label: str, other: str) -> None:
    """Another cache over the memory of one."""
    first = here.caches[label]
    cache = here.live.cache_manager.register_blocks_cache(
        first.cache_desc, first.tensor_addrs, remote_accessible=here.any["one sided"] or None
    )
    here.caches[other], here.arrays[other] = cache, cache.numpy()


def _pull_of(here: Here, label: str, req: int, token: bytes) -> None:
    nodes.clear(here, label)
    here.live.cache_manager.pull_blocks(
        CacheKey(1, req), here.caches[label], (), [0, 1, 2, 3], token=token
    )

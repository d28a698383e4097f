"""`datadist.empty`: memory that peers map, made before the engine; when it goes (shared_arrays.py)."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import datadist
from datadist import BlocksCacheKey, CacheDesc, CacheKeyByIdAndIndex, DataType, LLMException
from datadist.base import memory_room
from datadist.base.shared_memory import find
from tests import nodes
from tests.nodes import Here, Node
from tests.waiting import until

Start = Callable[..., Node]
MIB = 1 << 20


def _held() -> tuple[set[int], set[int]]:
    """Files of pools, this process's or those of peers, by inode: the mapped ones, and the open ones."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = {int(line.split()[4]) for line in lines if f"memfd:{memory_room.PREFIX}" in line}
    opened = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # another thread has closed it
            if f"memfd:{memory_room.PREFIX}" in os.readlink(link):
                opened.add(link.stat().st_ino)
    return mapped, opened


def _held_beside(before: tuple[set[int], set[int]]) -> set[int]:
    """Files that are held now and were not; what earlier tests left may go at any moment."""
    mapped, opened = _held()
    return (mapped - before[0]) | (opened - before[1])


def test_arrays_are_zeroed_and_as_asked_for() -> None:
    for shape, dtype, expected in (
        ((3, 5), np.float16, np.float16), (7, "int32", np.int32), ([2, 3, 4], DataType.DT_INT8, np.int8),
        ((), float, np.float64), ((4,), np.dtype("f4"), np.float32),
    ):  # fmt: skip
        array = datadist.empty(shape, dtype)
        assert array.shape == np.empty(shape).shape
        assert array.dtype == expected
        assert not array.any()
        array[...] = 1
        assert (array == 1).all()
    assert datadist.empty((0, 5)).shape == (0, 5)
    assert datadist.empty(3, DataType.DT_BF16).dtype.itemsize == 2


def test_what_is_no_array() -> None:
    wrong: list[tuple[Any, Any, type[Exception]]] = [
        ((2, -1), float, ValueError), ("x", float, TypeError), (2.5, float, TypeError),
        (3, object, TypeError), (3, "no type", TypeError), (1 << 62, np.int8, MemoryError),
        (1 << 70, np.int8, MemoryError),
    ]  # fmt: skip
    before = _held()
    for shape, dtype, error in wrong:
        with pytest.raises(error):
            datadist.empty(shape, dtype)
    assert not _held_beside(before)


def test_memory_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    room = memory_room.Room(MIB, "a small host", 0)
    monkeypatch.setattr("datadist.base.shared_memory.least_room", lambda _inode: room)
    before = _held()
    with pytest.raises(MemoryError, match="1048576 bytes are available in a small host"):
        datadist.empty(2 * MIB, np.int8)
    assert not _held_beside(before)


def test_a_system_without_such_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_name: str, _flags: int = 0) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(LLMException, match="cannot have 1048576 bytes of shared memory"):
        datadist.empty(MIB, np.int8)


def test_the_memory_goes_with_the_last_array() -> None:
    before = _held()
    array = datadist.empty((4, MIB), np.int8)
    part = array[2, 5:9]
    address = array.ctypes.data
    assert find(address + MIB, 3 * MIB) is not None
    assert find(address + MIB, 4 * MIB) is None
    del array
    assert _held_beside(before)
    part[:] = 1
    del part
    gc.collect()
    assert not _held_beside(before)
    assert find(address, 1) is None


def test_a_forked_child_keeps_what_it_uses_and_no_descriptor() -> None:
    before = _held()
    array = datadist.empty(MIB, np.int32)
    array[:] = 7
    pid = os.fork()
    if pid == 0:
        right = (array == 7).all() and _held()[1] <= before[1]
        os._exit(0 if right and find(array.ctypes.data, 4) is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (array == 7).all()


# -- between processes ---------------------------------------------------------------------------

LAYERS, BLOCKS, WIDTH = 40, 6, 1024


def _make(here: Here, cluster: int, together: bool, writable: bool) -> None:
    """First the memory, in one array or in one per layer, then the engine."""
    if together:
        whole = datadist.empty((LAYERS, BLOCKS, WIDTH), np.int32)
        layers = list(whole)
    else:
        layers = [datadist.empty((BLOCKS, WIDTH), np.int32) for _ in range(LAYERS)]
    nodes.init(here, cluster, pool=0, enable_remote_cache_accessible=writable)
    desc = CacheDesc(LAYERS, [BLOCKS, WIDTH], DataType.DT_INT32, tensors_per_layer=1)
    addresses = [layer.ctypes.data for layer in layers]
    cache = here.live.cache_manager.register_blocks_cache(desc, addresses, BlocksCacheKey(cluster))
    here.caches["cache"], here.arrays["cache"] = cache, layers


def _mapped(here: Here, owner: int) -> int:
    """Mappings here of memory of that process."""
    del here
    return Path("/proc/self/maps").read_text().count(f"memfd:{memory_room.PREFIX}{owner} ")


def _held_there(here: Here) -> tuple[set[int], set[int]]:
    del here
    gc.collect()
    return _held()


def _forget(here: Here, comm_id: int) -> None:
    here.live.unlink(comm_id)
    here.live.cache_manager.unregister_cache(here.caches.pop("cache").cache_id)
    here.arrays.clear()


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("writable", [True, False])
def test_peers_map_it_and_nothing_is_left(
    start_node: Start, together: bool, writable: bool
) -> None:
    owner, user = start_node(), start_node()
    before = [node.do(_held_there) for node in (owner, user)]
    for cluster, node in enumerate((owner, user), 1):
        node.do(_make, cluster, together, writable)
    links = nodes.link_pair(owner, user)
    files = 1 if together else LAYERS
    assert user.do(_mapped, owner.pid) >= files
    owner.do(nodes.fill, "cache", 1)
    if writable:
        owner.do(
            nodes.push_blocks, BlocksCacheKey(2), "cache", [0, 5], [5, 1], tensor_num_per_layer=1
        )
    else:
        user.do(nodes.pull_blocks, BlocksCacheKey(1), "cache", [0, 5], [5, 1])
    for n, found in enumerate(user.do(nodes.read, "cache")):
        np.testing.assert_array_equal(found[[5, 1]], nodes.pattern(1, n, (BLOCKS, WIDTH))[[0, 5]])
        assert not found[[0, 2, 3, 4]].any()
    for node, comm_id in zip((user, owner), (links[1], links[0]), strict=True):
        node.do(_forget, comm_id)
    until(lambda: [node.do(_held_there) for node in (owner, user)] == before)


def _register_anew(here: Here) -> int:
    """The same bytes again, while a link from before exposes them; the id of the cache."""
    manager, layers = here.live.cache_manager, here.arrays["cache"]
    manager.unregister_cache(here.caches.pop("cache").cache_id)
    cache = manager.register_cache(
        CacheDesc(LAYERS, [BLOCKS, WIDTH], DataType.DT_INT32), [a.ctypes.data for a in layers]
    )
    here.caches["cache"] = cache
    return cache.cache_id


def _array_goes(here: Here) -> bool:
    """Unregister and drop an array that a link exposes; whether its addresses stay ours."""
    here.live.cache_manager.unregister_cache(here.caches.pop("cache").cache_id)
    address = here.arrays.pop("cache")[0].ctypes.data
    gc.collect()
    return find(address, 1) is not None


def test_addresses_that_a_link_exposes_are_not_used_for_other_memory(start_node: Start) -> None:
    owner, user = start_node(), start_node()
    for cluster, node in enumerate((owner, user), 1):
        node.do(_make, cluster, True, False)
    links = nodes.link_pair(owner, user)
    cache_id = owner.do(_register_anew)
    owner.do(nodes.fill, "cache", 3)
    user.do(_register_anew)
    user.do(nodes.pull_cache, CacheKeyByIdAndIndex(1, cache_id), "cache")
    for n, found in enumerate(user.do(nodes.read, "cache")):
        np.testing.assert_array_equal(found[0], nodes.pattern(3, n, (BLOCKS, WIDTH))[0])
    assert owner.do(_array_goes), "a link still exposes it"
    owner.do(nodes.unlink, links[0])
    until(lambda: owner.do(_held_there) == (set(), set()))


def _too_many(here: Here, count: int) -> None:
    arrays = [datadist.empty(1024, np.int32) for _ in range(count)]
    here.any["arrays"] = arrays
    desc = CacheDesc(count, [1, 1024], DataType.DT_INT32)
    here.live.cache_manager.register_cache(desc, [array.ctypes.data for array in arrays])


def test_more_arrays_than_a_link_carries_are_refused_in_words(start_node: Start) -> None:
    owner, user = start_node(1, pool=0), start_node(2)
    owner.do(_too_many, 121)
    comm_id = owner.do(nodes.link, "pair", {1: 0, 2: 1})
    user.do(nodes.link, "pair", {1: 0, 2: 1})
    with pytest.raises(nodes.RemoteError, match="121 arrays"):
        owner.do(nodes.wait, comm_id)


# -- torch ----------------------------------------------------------------------------------------


def _torch_layers(shape: list[int]) -> list[Any]:
    import torch

    from datadist.torch_memory import TorchMemory

    with TorchMemory():
        layers = [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(2)]
        layers.append(torch.full(shape, 3, dtype=torch.bfloat16))
        layers.append(torch.ones(*shape, dtype=torch.bfloat16))
        layers.append(torch.empty(shape, dtype=torch.bfloat16, device="cpu"))
        small = torch.zeros(8)
    assert find(small.data_ptr(), 32) is None
    return layers


def _make_of_torch(here: Here, cluster: int) -> None:
    layers = _torch_layers([8, 65536])
    assert all(find(layer.data_ptr(), layer.nbytes) is not None for layer in layers)
    assert [layer.float().mean().item() for layer in layers] == [0, 0, 3, 1, 0]
    nodes.init(here, cluster, pool=0)
    manager = here.live.cache_manager
    desc = CacheDesc.from_tensors(layers)
    cache = manager.register_blocks_cache(desc, layers, BlocksCacheKey(cluster))
    here.caches["cache"], here.any["layers"] = cache, layers


def _fill_torch(here: Here) -> None:
    for number, layer in enumerate(here.any["layers"]):
        layer[2] = number + 2


def _read_torch(here: Here) -> list[float]:
    return [layer[5].float().mean().item() for layer in here.any["layers"]]


def test_tensors_of_torch_are_mapped(start_node: Start) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    owner, user = start_node(), start_node()
    for cluster, node in enumerate((owner, user), 1):
        node.do(_make_of_torch, cluster)
    nodes.link_pair(owner, user)
    assert user.do(_mapped, owner.pid) >= 5
    owner.do(_fill_torch)
    user.do(nodes.pull_blocks, BlocksCacheKey(1), "cache", [2], [5])
    assert user.do(_read_torch) == [2, 3, 4, 5, 6]


def test_torch_from_numpy_shares_the_memory_and_keeps_it() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    before = _held()
    tensor = torch.from_numpy(datadist.empty((4, MIB), np.uint8)).view(torch.bfloat16)
    gc.collect()
    assert find(tensor.data_ptr(), tensor.nbytes) is not None
    tensor[1] = 2
    assert tensor[1].float().mean().item() == 2
    del tensor
    gc.collect()
    assert not _held_beside(before)

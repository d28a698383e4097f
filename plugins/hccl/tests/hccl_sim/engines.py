"""Engines on the simulator for tests of the documented API, with paged caches of a framework."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

import hccl_sim
from datadist import BlocksCacheKey, CacheDesc, DataType
from tests import nodes
from tests.nodes import Here, pattern

MIB = 1 << 20
PAIR = {1: 0, 2: 1}

CONTRACT_TABLE = """
{
    "server_count": "2",
    "server_list": [
        {
            "device": [
                {
                    "device_id": "0",
                    "device_ip": "192.168.1.8",
                    "rank_id": "0"
                },
            ],
            "server_id": "10.172.0.1"
        },
        {
            "device": [
                {
                    "device_id": "0",
                    "device_ip": "192.168.1.9",
                    "rank_id": "1"
                },
            ],
            "server_id": "10.172.0.2"
        }
    ],
    "status": "completed",
    "version": "1.0"
}
"""
"""The example of the documentation of `link`, with its placeholders filled in."""


class Framework:
    """Memory of the accelerator as the user's framework handles it: the engine never does."""

    def __init__(self, backend: str, device: int = 0) -> None:
        self.sim = hccl_sim.Simulator() if backend == "hccl" else None
        self.kept: list[Any] = []
        if self.sim:
            self.sim.use_device(device)

    def empty(self, size: int) -> int:
        """New memory; its address."""
        if self.sim:
            return self.sim.malloc(size)
        self.kept.append(np.zeros(size, np.int8))
        return int(self.kept[-1].ctypes.data)

    def write(self, address: int, array: NDArray[Any]) -> None:
        """Copy an array to the device."""
        if self.sim:
            self.sim.write(address, array.tobytes())
        else:
            ctypes.memmove(address, array.tobytes(), array.nbytes)

    def read(self, address: int, shape: tuple[int, ...]) -> NDArray[np.int32]:
        """Copy an array from the device."""
        size = int(np.prod(shape)) * 4
        data = self.sim.read(address, size) if self.sim else ctypes.string_at(address, size)
        return np.frombuffer(data, np.int32).reshape(shape)


BLOCKS, BLOCK = 64, 2048
SHAPE = (BLOCKS, BLOCK)


def paged_engine(
    here: Here, cluster: int, backend: str, key: BlocksCacheKey | None, **settings: Any
) -> None:
    nodes.init(here, cluster, 4 * MIB, transfer_backend=backend, **settings)
    framework = here.any["framework"] = Framework(backend, settings.get("device_id", 0))
    desc = CacheDesc(4, list(SHAPE), DataType.DT_INT32)
    addresses = [framework.empty(BLOCKS * BLOCK * 4) for _ in range(4)]
    here.caches["paged"] = here.live.cache_manager.register_blocks_cache(desc, addresses, key)
    fill(here, "paged", cluster)


def fill(here: Here, label: str, seed: int) -> None:
    cache = here.caches[label]
    for tensor, address in enumerate(cache.tensor_addrs):
        here.any["framework"].write(address, pattern(seed, tensor, tuple(cache.cache_desc.shape)))


def contents(here: Here, label: str) -> list[NDArray[np.int32]]:
    cache = here.caches[label]
    shape = tuple(cache.cache_desc.shape)
    return [here.any["framework"].read(address, shape) for address in cache.tensor_addrs]


def link(here: Here, table: str, name: str = "pair") -> int:
    comm_id = here.live.link(name, PAIR, table)
    here.live.wait_link(comm_id)
    return comm_id


SOURCE, TARGET = [0, 1, 2, 9, 40, *range(20, 30)], [5, 6, 7, 0, 63, *range(40, 50)]


def moved(seed: int, into: int) -> list[NDArray[np.int32]]:
    expected = [pattern(into, tensor, SHAPE) for tensor in range(4)]
    for tensor, array in enumerate(expected):
        array[TARGET] = pattern(seed, tensor, SHAPE)[SOURCE]
    return expected


def live(here: Here) -> dict[str, int]:
    live: dict[str, int] = here.any["framework"].sim.live()
    return live

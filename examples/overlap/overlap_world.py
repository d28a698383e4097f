"""Four owners of caches in processes of their own, and the engine here that pulls from them."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from datadist import BlocksCacheKey, Cache, CacheDesc, DataType, LLMConfig, LLMDataDist, LLMRole

OWNERS, PULLS = 4, 64
OWN = 10
"""Our cluster id; those of the owners are 1 to 4."""
BLOCKS, LAYERS, PER_PULL = 256, 8, 4
BLOCK = [4, 8, 64]
"""Tokens, heads and elements of a block: 4 KiB of float16."""


class World:
    """The engine that pulls: request ``n`` has blocks of its own here, and some of an owner's."""

    def __init__(self, engine: LLMDataDist, cache: Cache) -> None:
        self.manager = engine.cache_manager
        self.cache = cache

    def request(self, number: int) -> tuple[BlocksCacheKey, list[int], list[int]]:
        """Whose blocks to pull, which ones, and where to."""
        first = number * PER_PULL
        source = [(first + n) % BLOCKS for n in range(PER_PULL)]
        return BlocksCacheKey(1 + number % OWNERS), source, list(range(first, first + PER_PULL))

    def one_after_another(self) -> None:
        """What a program without tasks does."""
        for number in range(PULLS):
            key, source, target = self.request(number)
            self.manager.pull_blocks(key, self.cache, source, target)

    def timed(self, name: str, pulls: Callable[[], object]) -> None:
        """Clear the cache, run all pulls, print how long they took, and check what has come."""
        for tensor in self.cache.numpy():
            tensor[:] = 0
        began = time.perf_counter()
        pulls()
        seconds = time.perf_counter() - began
        for number in range(PULLS):
            key, _, target = self.request(number)
            for tensor in self.cache.numpy():
                if (tensor[target] != key.cluster_id).any():
                    sys.exit(f"{name}: request {number} has not come")
        print(f"{name}: {PULLS} pulls from {OWNERS} owners in {seconds * 1000:.1f} ms")


@contextmanager
def world() -> Iterator[World]:
    """Start everybody and link; at the end, stop them."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="overlap-") as place:
        pipes, processes = [], []
        for cluster in range(1, OWNERS + 1):
            pipe, theirs = context.Pipe()
            processes.append(context.Process(target=_own, args=(cluster, place, theirs)))
            processes[-1].start()
            theirs.close()
            pipes.append(pipe)
        try:
            with _engine(OWN, place) as engine:
                cache = engine.cache_manager.allocate_blocks_cache(_desc())
                for cluster in range(1, OWNERS + 1):
                    engine.wait_link(_link(engine, cluster))
                yield World(engine, cache)
        finally:
            for pipe in pipes:
                pipe.close()
            for process in processes:
                process.join()


def _own(cluster: int, place: str, pipe: Connection) -> None:
    """An owner: its cache holds its number; it does nothing until the other end hangs up."""
    with _engine(cluster, place) as engine:
        cache = engine.cache_manager.allocate_blocks_cache(_desc(), BlocksCacheKey(cluster))
        for tensor in cache.numpy():
            tensor[:] = cluster
        engine.wait_link(_link(engine, cluster))
        pipe.poll(None)


def _engine(cluster: int, place: str) -> LLMDataDist:
    os.environ["DATADIST_RUNTIME_DIR"] = place
    config = LLMConfig()
    config.enable_cache_manager = True
    config.sync_kv_timeout = 10_000
    config.mem_pool_cfg = '{"memory_size": 33554432}'
    engine = LLMDataDist(LLMRole.MIX, cluster)
    engine.init(config.generate_options())
    return engine


def _link(engine: LLMDataDist, owner: int) -> int:
    devices = [{"device_id": str(rank), "rank_id": str(rank)} for rank in (0, 1)]
    table = {
        "version": "1.0", "status": "completed", "server_count": "1",
        "server_list": [{"server_id": "here", "device": devices}],
    }  # fmt: skip
    return engine.link(f"owner {owner}", {owner: 0, OWN: 1}, json.dumps(table))


def _desc() -> CacheDesc:
    return CacheDesc(LAYERS, [BLOCKS, *BLOCK], DataType.DT_FLOAT16)

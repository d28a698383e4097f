"""This library over one of its transports, through the public API."""

from __future__ import annotations

from collections.abc import Mapping

from contenders.memory import Lists
from datadist import BlocksCacheKey, CacheKeyByIdAndIndex
from datadist.bench.measure import pool_for
from datadist.bench.measured_engine import OWN, PEER, MeasuredEngine, Settings, model_of
from datadist.bench.shapes import Shape

ROUNDING = 256 << 10
"""Bytes of a pool beside the cache: no more memory than other engines register."""


class Owner:
    """Cluster 1."""

    cluster = PEER

    def __init__(self, shape: Shape, tuning: Mapping[str, str]) -> None:
        settings = Settings(
            tuning.get("backend", "shm"),
            tuning.get("memory", "pool"),
            tuning.get("direction", "pull"),
        )
        self.shape, self.push = shape, settings.direction == "push"
        self.side = MeasuredEngine(self.cluster, settings)
        pooled = settings.memory == "pool"
        self.side.start(shape.cache_bytes + ROUNDING if pooled else pool_for(settings, shape))
        self.cache_id = self.side.make("cache", shape, (self.cluster == PEER) is not self.push)

    def card(self) -> int:
        """What the puller needs to know."""
        return self.cache_id

    def expect(self) -> None:
        """Be ready for a puller that connects."""
        self.side.link("compare", 2)

    def clear(self) -> None:
        """Zero the target."""
        self.side.clear("cache")

    def problems(self, lists: Lists) -> list[str]:
        """What is wrong after one transfer into cleared memory."""
        return self.side.problems("cache", self.shape, lists)

    def close(self) -> None:
        """Give everything up."""
        self.side.stop()


class Mover(Owner):
    """Cluster 2."""

    cluster = OWN

    def connect(self, card: int) -> None:
        """Link, until transfers can begin."""
        self.side.wait(self.side.link("compare", 2))
        self.manager, self.cache = self.side.engine.cache_manager, self.side.caches["cache"]
        self.key = BlocksCacheKey(PEER, model_of(self.shape))
        self.slot = CacheKeyByIdAndIndex(PEER, card)

    def move(self, lists: Lists) -> None:
        """One pull or push, with lists that were not seen before."""
        if self.push:
            self.manager.push_blocks(self.key, self.cache, *lists, tensor_num_per_layer=1)
        elif self.shape.contiguous:
            self.manager.pull_cache(self.slot, self.cache)
        else:
            self.manager.pull_blocks(self.key, self.cache, *lists)

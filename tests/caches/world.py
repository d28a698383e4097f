"""The caches of an engine without the rest of it, a peer that hears of them, and what always holds."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any, cast

from datadist.api.allocation import Allocation
from datadist.api.cache import Cache
from datadist.caches.directory import KeyName
from datadist.caches.memory import Memory
from datadist.caches.owned import OwnCache, OwnDirectory
from datadist.caches.peers import PeerView
from datadist.caches.pool_config import PoolConfig
from datadist.control.messages import Directory, Message
from datadist.control.session import Session
from datadist.transport import Placement, Region
from datadist.types import BlocksCacheKey, CacheDesc, CacheKey, DataType

PAGES = 64
POOL = 1 << 30
DEVICE = Placement.DEVICE


class _Transport:
    """Memory that is not there. Knows what is registered, each range once."""

    def __init__(self) -> None:
        self.capabilities = SimpleNamespace(max_registered={}, host_addressable={DEVICE})
        self.live: set[tuple[int, int]] = set()

    def allocate(self, size: int, placement: Placement) -> Region:
        return Region(POOL, size, placement)

    def registering(self) -> AbstractContextManager[None]:
        return nullcontext()

    def register(self, address: int, size: int, placement: Placement) -> Region:
        region = Region(address, size, placement)
        assert (address, size) not in self.live
        self.live.add((address, size))
        return region

    def release(self, region: Region) -> None:
        self.live.discard((region.address, region.size))


class _Peer:
    """A session to a peer that hears what it is told when :meth:`World.ack` lets it."""

    def __init__(self) -> None:
        self.closed = False
        self.said: list[Directory] = []

    def send(self, message: Message) -> None:
        if isinstance(message, Directory):
            self.said.append(message)

    send_soon = send


class World:
    """One engine's caches; a page of the pool is 1024 bytes, a tensor as large as asked for."""

    def __init__(self) -> None:
        self.transport = _Transport()
        self.memory = Memory(cast("Any", self.transport))
        self.memory.add_pool(DEVICE, PoolConfig(memory_size=PAGES << 10, page_shift=10))
        self.owned = OwnDirectory(self.memory)
        self.peer = _Peer()
        self.view = PeerView(cast("Session", self.peer))
        self.known = PeerView(cast("Session", _Peer()))
        """What the peer knows."""
        self.owned.publication.subscribe(self.view)
        engine = SimpleNamespace(
            memory=self.memory, owned=self.owned, transport=self.transport, over=False, forked=False,
            words=SimpleNamespace(prepare=lambda: None),
        )  # fmt: skip
        self.manager = Allocation(cast("Any", engine), cast("Any", None), one_sided=False)
        self.finished = 0
        self.pinned: OwnCache | None = None
        self.caches: list[Cache] = []
        """What the user has got and not freed."""

    def allocate(self, *keys: int, tensors: int = 2, slots: int = 2) -> Cache:
        desc = CacheDesc(tensors, [slots, 1024], DataType.DT_INT8)
        cache = self.manager.allocate_cache(desc, [CacheKey(1, key) for key in keys])
        self.caches.append(cache)
        return cache

    def allocate_blocks(self, model: int | None = None) -> Cache:
        key = None if model is None else BlocksCacheKey(1, model)
        cache = self.manager.allocate_blocks_cache(CacheDesc(3, [3, 1024], DataType.DT_INT8), key)
        self.caches.append(cache)
        return cache

    def register(self, *addresses: int, keys: tuple[int, ...] = ()) -> Cache:
        desc = CacheDesc(len(addresses), [4, 16], DataType.DT_INT8)
        cache = self.manager.register_cache(
            desc, [*addresses], [CacheKey(1, key) for key in keys], remote_accessible=True
        )
        self.caches.append(cache)
        return cache

    def unregister(self, cache_id: int) -> None:
        """Without the wait for the peer, which answers in :meth:`ack`."""
        self.owned.unregister(cache_id, 0.0, certain=False)

    def ack(self) -> None:
        """The peer hears everything, and lets go of what is gone."""
        while self.peer.said:
            message = self.peer.said.pop(0)
            self.known.apply(message)
            self.owned.revocations.on_ack(self.view, message.seq)

    def settle(self) -> None:
        self.owned.settle()
        self.ack()
        self.owned.settle()
        self.memory.settle()

    def check(self, where: str) -> None:
        """All that is noted anywhere agrees with the caches there are; nothing is lost."""
        self.settle()
        caches = self.owned._caches
        pages = [
            page
            for cache in caches.values()
            for start, count in cache.runs
            for page in range(start, start + count)
        ]
        assert len(pages) == len(set(pages)), f"handed out twice: {where}"
        usage = self.memory.pool_usage(DEVICE)
        assert usage["pages_used"] == len(pages), where
        assert usage["pages_used"] + usage["pages_free"] == PAGES, where
        assert usage["allocations_returning"] == 0, where
        assert not self.owned._untold, where
        assert not self.owned._leaving, where
        self._check_keys(where)
        self._check_regions(where)

    def _check_keys(self, where: str) -> None:
        caches = self.owned._caches
        wanted = {
            cache_id: {(b.space, b.key, b.model) for b in cache.bindings.values()}
            for cache_id, cache in caches.items()
        }
        for directory in (self.owned._index, self.known.directory):
            found = {
                cache_id: {(b.space, b.key, b.model) for b in directory.bindings(cache_id)}
                for cache_id in directory.entries
            }
            assert found == wanted, where
            indexed = sorted(
                (place[0], tuple(name))
                for name, named in directory._index.items()
                for place in named
            )
            assert indexed == sorted((i, name) for i, names in wanted.items() for name in names), (
                where
            )
        for names in wanted.values():
            for space, key, model in names:
                assert self.owned.bound(KeyName(space, key, model)), where

    def _check_regions(self, where: str) -> None:
        used: dict[int, set[object]] = {}
        for cache_id, cache in self.owned._caches.items():
            for region_id in () if cache.pooled else cache.regions:
                used.setdefault(region_id, set()).add(cache_id)
        held = {i: held for i, held in self.memory._held.items() if held.region.address != POOL}
        assert {i: h.users for i, h in held.items()} == used, where
        assert self.transport.live == {(h.region.address, h.region.size) for h in held.values()}, (
            where
        )
        assert not self.memory._fresh, where
        assert not self.memory._dropped, where

    def check_all_can_be_freed(self, where: str) -> None:
        """Nothing is left once the user has freed what he knows of, and removed the keys."""
        for cache in list(self.caches):
            self.free(cache)
        self.settle()
        for own in list(self.owned._caches.values()):
            assert own.pooled, f"nobody has it: {where}"
            assert not own.held, f"nobody has it: {where}"
            for binding in list(own.bindings.values()):
                self.owned.remove_key(KeyName(binding.space, binding.key, binding.model))
        self.check(where)
        assert not self.owned._caches, where
        cache = self.allocate(tensors=1, slots=PAGES)
        self.free(cache)
        self.check(where)

    def free(self, cache: Cache) -> None:
        """As the user does it; may be repeated."""
        if not cache._pooled:
            self.unregister(cache.cache_id)
        elif cache.is_blocks_cache:
            self.manager.deallocate_blocks_cache(cache)
        else:
            self.manager.deallocate_cache(cache)
        if cache in self.caches:
            self.caches.remove(cache)

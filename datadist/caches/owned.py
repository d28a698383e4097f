"""Our own caches and keys, and their publication to linked peers.

Reference counting (LLM-DataDist API, caches): a pool-owned cache is referenced by its id and by
each key bound to one of its slots. Its memory returns to the pool when all references are gone,
peers have confirmed that they do not access it, and no local transfer uses it. Registered memory
stays the caller's.

Which caches there are is one dict; a cache comes, loses a key, or goes, in one step. Before that its id
is noted as one of which index and peers are to be told: an exception may come anywhere, and the next
call completes what it finds noted.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import repeat
from operator import attrgetter
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from datadist.base.exclusive import Exclusive
from datadist.base.range_set import RangeSet
from datadist.caches.by_address import TensorsByAddress
from datadist.caches.directory import KeyDirectory, KeyName, name_of
from datadist.caches.memory import Memory
from datadist.caches.own_cache import Birth, Layout, Leaving, OwnCache, Waiter
from datadist.caches.peers import TOKENS
from datadist.caches.publication import Publication
from datadist.caches.revocations import Revocations
from datadist.control.account import MAX_CACHES, MAX_TENSORS
from datadist.control.account import MAX_KEYS as MAX_ALL_KEYS
from datadist.control.messages import MAX_KEYS, Binding, Entry
from datadist.status import LLMException, LLMStatusCode, param_invalid
from datadist.transport import Placement
from datadist.types import INVALID_ID

__all__ = ["Birth", "Layout", "OwnCache", "OwnDirectory", "describe"]

T = TypeVar("T")


class OwnDirectory:
    """Caches by id and key; every change is published to the subscribed peers, in order.

    Any thread. What a signal handler or ``__del__`` may call, inside of another call of its thread, is
    done after that one: freeing, removing keys, unregistering. Else ``RuntimeError`` is raised there.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._state = Exclusive()
        self._caches: dict[int, OwnCache] = {}
        self._leaving: dict[int, Leaving] = {}
        self._untold: dict[int, None] = {}
        """Ids of which index and peers may not know what became of them."""
        self._in_use: dict[int, None] = {}
        """Ids of caches that transfers used when they were to be freed; their end frees them."""
        self._births: dict[int, Birth] = {}
        self._index = KeyDirectory()
        self._cache_ids = itertools.count(1)
        self._binding_ids = itertools.count(1)
        self._changes = 0
        """Counts what changes :meth:`caches_at`."""
        self._by_address = TensorsByAddress()
        self.before_removal: Callable[[int], object] = lambda _cache_id: None
        """Called before the memory of a cache may be reused; it may be called again."""
        self.granted: Mapping[KeyName, object] = {}
        """Keys that name grants, so that no cache can have them."""
        self.revocations = Revocations()
        self.publication = Publication(self._state, self._settle, self._entries, self.revocations)

    def __len__(self) -> int:
        """How many caches there are."""
        return len(self._caches)

    def hand_over_to(self, post: Callable[[Callable[[], None]], object]) -> None:
        """Have ``post`` run what peers go on asking for while a thread of the caller serves them."""
        self._state.hand_over = post
        self.revocations.hand_over_to(post)

    @property
    def caches(self) -> Mapping[int, OwnCache]:
        """Those that exist now, by id: always the same mapping, which changes."""
        return self._caches

    @property
    def state(self) -> Exclusive:
        """Held by whoever changes caches and keys, and what else goes with them."""
        return self._state

    # -- local changes -----------------------------------------------------------------------

    def settle(self, wait: bool = True) -> None:
        """Complete what an exception interrupted, and undo what was to become a cache and did not.

        With ``wait`` all has been done that was asked for before, by whatever thread; not for handlers
        and ``__del__``.
        """
        self.revocations.settle()
        if not (self._births or self._untold or self._in_use):
            self._state.serve(wait)
        elif wait:
            self._state.do(self._settle)
        else:
            self._state.post(self._settle)

    def _settle(self) -> None:
        for cache_id in list(self._untold):
            self._tell(cache_id)
        for cache_id in list(self._in_use):
            self._free_if_unused(cache_id)
        for birth in list(self._births.values()):
            if birth.failed:
                self._undo(birth)
            if birth.failed or birth.made:
                self._births.pop(birth.cache_id, None)

    def _undo(self, birth: Birth) -> None:
        cache = self._caches.get(birth.cache_id)
        if cache is not None:
            self._remove(cache)
        elif birth.cache_id not in self._leaving:
            if birth.pool is not None:
                self._memory.give_back(birth.pool, birth.cache_id, birth.runs)
            else:
                regions = self._memory.regions_of(birth.cache_id)
                self._memory.unregister_later(regions, birth.cache_id)

    def _run(self, change: Callable[[], T]) -> T:
        def settled() -> T:
            self._settle()
            return change()

        return self._state.run(settled)

    def begin(self, pool: Placement | None) -> Birth:
        """Begin to make a cache, whose id is new, from 1: see :class:`Birth`.

        The caller sets ``made`` when it hands the cache over, or ``failed``, and then settles.
        """
        self.settle()
        birth = Birth(next(self._cache_ids), pool)
        self._births[birth.cache_id] = birth
        return birth

    def add(self, cache: OwnCache, keys: Sequence[tuple[int, KeyName]], unique: bool) -> None:
        """Take a cache with ``keys`` as (slot, name) pairs; ``unique`` refuses keys bound already.

        Raises LLM_PARAM_INVALID for a key that is bound on this engine, for too many keys, and for
        more caches, tensors or keys than peers take of one engine.
        Whatever it raises, the cache is not kept.
        """
        if len(keys) > MAX_KEYS:
            raise param_invalid(
                f"{len(keys)} cache keys: one cache takes at most {MAX_KEYS}; spread them over "
                "several caches, or pull by cache id and index"
            )
        bindings = {binding.id: binding for binding in map(self._binding, keys)}
        self._run(lambda: self._add(cache, bindings, keys if unique else ()))

    def _add(
        self, cache: OwnCache, bindings: dict[int, Binding], unique: Sequence[tuple[int, KeyName]]
    ) -> None:
        if self.granted:
            for binding in bindings.values():
                self._check_ungranted(binding.slot, name_of(binding))
        for slot, name in unique:
            self._check_unbound(slot, name)
        self._check_room(cache, len(bindings))
        cache.bindings.update(bindings)
        try:
            self._untold[cache.cache_id] = None
            self._caches[cache.cache_id] = cache
            self._changes += 1
            self._tell(cache.cache_id)
        except BaseException:
            self._remove(cache)
            raise

    def _check_room(self, cache: OwnCache, keys: int) -> None:
        tensors = max(len(cache.layout.bases), len(cache.regions))
        for held, more, most, words in (
            (len(self._caches), 1, MAX_CACHES, "caches"),
            (self._index.tensors, tensors, MAX_TENSORS, "tensors of caches"),
            (self._index.keys, keys, MAX_ALL_KEYS, "cache keys"),
        ):
            if held + more > most:
                raise param_invalid(
                    f"this engine has {held} {words}, and with {more} more it would have more than the "
                    f"{most} that peers take of one engine: free some first"
                )

    def _binding(self, key: tuple[int, KeyName]) -> Binding:
        slot, name = key
        return Binding(
            id=next(self._binding_ids), slot=slot, space=name.space, key=name.key, model=name.model
        )

    def bound(self, name: KeyName) -> bool:
        """Whether a key is bound on this engine."""
        return self._run(lambda: self._index.find(name) is not None)

    def _check_unbound(self, slot: int, name: KeyName) -> None:
        found = self._index.find(name)
        if found is not None:
            raise param_invalid(
                f"key {slot} ({describe(name)}) is bound to cache {found[0].cache_id} already: "
                f"{_how_to_unbind(name)} first, or use another key"
            )

    def _check_ungranted(self, slot: int, name: KeyName) -> None:
        if name in self.granted:
            raise param_invalid(
                f"key {slot} ({describe(name)}) names a grant of this engine: revoke it first, or use "
                "another key"
            )

    def cache_of(self, name: KeyName) -> int | None:
        """The id of the cache that a key is bound to; for who holds :attr:`state`."""
        found = self._index.find(name)
        return None if found is None else found[0].cache_id

    def get(self, cache_id: int) -> OwnCache | None:
        """The cache of an id, or None."""
        return self._caches.get(cache_id)

    def using(self, cache_id: int, use: Callable[[OwnCache], T]) -> T:
        """:meth:`using_all` for one."""
        return self.using_all((cache_id,), lambda caches: use(caches[0]))

    def using_all(
        self, cache_ids: Iterable[int], use: Callable[[list[OwnCache]], T], freed_too: bool = False
    ) -> T:
        """What ``use`` returns for caches, whose memory is kept for that local transfer.

        ``freed_too``: also those whose ids were freed, as long as keys keep them.

        It is no context manager: where a handler of a signal raises at the end of one, it would keep
        what it holds as long as somebody keeps that exception.

        Raises LLM_KV_CACHE_NOT_EXIST.
        """
        token, caches = next(TOKENS), list[OwnCache]()
        pins = map(attrgetter("pins"), caches)
        let_go: Callable[[], object] = partial(deque, map(set.discard, pins, repeat(token)), 0)
        try:
            for cache_id in cache_ids:
                cache = self._caches.get(cache_id)
                if cache is not None:
                    caches.append(cache)
                if cache is None or not self.pin(cache, token, freed_too):
                    raise _not_here(cache_id)
            return use(caches)
        finally:
            let_go()  # all in C: no handler of a signal comes before that
            for cache in caches:
                self.unpin(cache, token)

    def pin(self, cache: OwnCache, token: int, freed_too: bool = False) -> bool:
        """Keep the memory of a cache until :meth:`unpin`; False if it does not exist any more.

        ``token`` is the next of :data:`TOKENS`. This takes no lock. A transfer adds its pin and
        then checks that the cache is still in the directory. Freeing removes the cache from the
        directory and then checks for pins. So one of the two always sees the other.
        """
        if not (cache.held or freed_too):
            return False
        cache.pins.add(token)
        if cache.cache_id in self._caches:
            return True
        self.unpin(cache, token)
        return False

    def unpin(self, cache: OwnCache, token: int) -> None:
        """Undo :meth:`pin`, if it was done."""
        cache.pins.discard(token)
        if cache.cache_id not in self._caches:  # it is to be freed
            self._state.post(lambda: self._free_if_unused(cache.cache_id))

    def caches_at(
        self, addresses: NDArray[np.int64], lengths: NDArray[np.int64], freed_too: bool = False,
        data_type: int | None = None,
    ) -> set[int]:  # fmt: skip
        """The live caches that hold these ranges, each range within one tensor.

        ``freed_too`` as in :meth:`using_all`. ``data_type``: only caches of that type.

        Raises LLM_PARAM_INVALID for the first range that no tensor holds.
        """
        caches = self._caches.values()
        return self._by_address.find(
            addresses, lengths, caches, self._changes, freed_too, data_type
        )

    def forget_tensors(self) -> None:
        """In a forked child, which has no caches: keep no memory that is the program's."""
        for cache in [*self._caches.values(), *(each.cache for each in self._leaving.values())]:
            cache.tensors.clear()

    def deallocate(self, cache_id: int) -> None:
        """Drop the id's reference to a pool-owned cache; the key of a blocks cache is removed too."""
        self._state.post(lambda: self._deallocate(cache_id))

    def _deallocate(self, cache_id: int) -> None:
        self._settle()
        cache = self._caches.get(cache_id)
        if cache is None or not cache.pooled:
            return
        cache.held = False
        self._changes += 1
        if cache.layout.blocks:
            cache.bindings = {}
        if not cache.bindings:
            self._remove(cache)

    def remove_key(self, name: KeyName) -> None:
        """Unbind a key of a pool-owned cache; anything else is left alone."""
        self._state.post(lambda: self._remove_key(name))

    def _remove_key(self, name: KeyName) -> None:
        self._settle()
        found = self._index.find(name)
        cache = self._caches.get(found[0].cache_id) if found else None
        if found is not None and cache is not None and cache.pooled:
            self._unbind(cache, found[1].id)

    def unregister(self, cache_id: int, timeout: float, certain: bool, waits: bool = True) -> None:
        """Forget a cache, keys included; pool-owned memory returns, registered is let go.

        With ``certain``, where peers may write: waits up to ``timeout`` seconds until no peer can be
        inside registered memory, and raises LLM_FAILED, keeping the cache, when one may be.

        Without ``waits``, inside of another call of the same thread, registered memory is let go later:
        once that call has ended, peers have let go, and no local transfer uses it.
        """
        cache = self._caches.get(cache_id)
        if cache is None:
            return
        if not cache.pooled:
            self._check_settled(cache)
        waiter = Waiter(waits and not cache.pooled)
        try:
            change = self._state.do if waiter.waits else self._state.post
            change(lambda: self._unregister(cache, waiter))
            if waiter.waits and waiter.leaving is not None:
                self._let_go(waiter.leaving, timeout, certain)
        except BaseException:
            waiter.waits = False
            self._untold[cache_id] = None  # the next call lets go of it
            self.settle()
            raise

    def _unregister(self, cache: OwnCache, waiter: Waiter) -> None:
        self._settle()
        if cache.cache_id in self._caches:
            self._remove(cache, waiter)
        waiter.leaving = self._leaving.get(cache.cache_id)

    def _let_go(self, leaving: Leaving, timeout: float, certain: bool) -> None:
        """Let go of registered memory once nobody uses it."""
        cache = leaving.cache
        if not leaving.released_by_peers.wait(timeout) and certain:
            self._run(lambda: self._put_back(cache))
            raise leaving.kept()
        while cache.pins:  # local transfers, which have deadlines of their own
            leaving.idle.wait(timeout)
        try:
            self._check_settled(cache)  # one that was pinned may have left something
        except LLMException:
            self._run(lambda: self._put_back(cache))
            raise
        self._memory.unregister(cache.regions, cache.cache_id)
        self._leaving.pop(cache.cache_id, None)
        cache.tensors.clear()

    def _check_settled(self, cache: OwnCache) -> None:
        kept = self._memory.quarantine.touching(cache.layout.ranges)
        if kept is not None:
            raise LLMException(
                f"cache {cache.cache_id} stays registered: {kept} (the peer is stopped, or a page does "
                "not come: userfaultfd, a file system that hangs); do not free that memory, and try "
                "again when the peer goes on, the page has come, or the peer has ended",
                status_code=LLMStatusCode.LLM_FAILED,
            )

    def _put_back(self, cache: OwnCache) -> None:
        self._untold[cache.cache_id] = None
        cache.held = True
        self._caches[cache.cache_id] = cache
        self._leaving.pop(cache.cache_id, None)
        self._changes += 1
        self._tell(cache.cache_id)

    def clear(self) -> None:
        """Forget everything (finalize)."""
        self._state.do(self._clear)

    def _clear(self) -> None:
        for cache in [*self._caches.values(), *(each.cache for each in self._leaving.values())]:
            if cache.tensors:
                self._memory.keep(cache.layout.ranges, cache.tensors)
        self._births.clear()
        self._untold.clear()
        self._leaving.clear()
        self._caches.clear()
        self._changes += 1
        self._index.replace_all([])
        self.publication.clear()

    # -- peers -------------------------------------------------------------------------------

    def consumed(self, cache_id: int, binding_id: int, start: int, stop: int) -> None:
        """A peer has pulled tensors ``[start, stop)`` of a slot by its key."""
        self._state.post(lambda: self._consumed(cache_id, binding_id, start, stop))

    def _consumed(self, cache_id: int, binding_id: int, start: int, stop: int) -> None:
        self._settle()
        cache = self._caches.get(cache_id)
        if cache is None or not cache.pooled or binding_id not in cache.bindings:
            return
        tensors = len(cache.layout.bases)
        covered = cache.covered.setdefault(binding_id, RangeSet())
        covered.add(start, min(stop, tensors))
        if covered.is_all(tensors):
            self._unbind(cache, binding_id)

    def _entries(self) -> list[Entry]:
        return [cache.entry() for cache in self._caches.values()]

    # -- one change --------------------------------------------------------------------------

    def _unbind(self, cache: OwnCache, binding_id: int) -> None:
        self._untold[cache.cache_id] = None
        cache.bindings.pop(binding_id, None)
        cache.covered.pop(binding_id, None)
        if cache.unreferenced:
            self._remove(cache)
            return
        self._index.unbind(cache.cache_id, binding_id)
        self.publication.publish([], [], [(cache.cache_id, binding_id)])
        self._untold.pop(cache.cache_id, None)

    def _remove(self, cache: OwnCache, waiter: Waiter | None = None) -> None:
        """Take a cache out; its memory returns once peers and transfers have let go of it."""
        cache_id = cache.cache_id
        self.before_removal(cache_id)
        self._leaving[cache_id] = Leaving(cache, waiter=waiter)
        self._untold[cache_id] = None
        cache.held = False
        self._caches.pop(cache_id, None)
        self._changes += 1
        self._tell(cache_id)

    def _tell(self, cache_id: int) -> None:
        """Let index and peers know what became of a cache; may be repeated."""
        cache, leaving = self._caches.get(cache_id), self._leaving.get(cache_id)
        if cache is not None and cache.unreferenced:
            self._remove(cache)
            return
        if cache is not None:
            entry = cache.entry()
            self._index.put(entry)
            self.publication.publish([entry], [])
        else:
            self._index.remove(cache_id)
            if leaving is not None and leaving.cache.pooled:
                layout = leaving.cache.layout
                self._memory.expect(layout.placement, cache_id, len(layout.bases))
            targets = self.publication.publish([], [cache_id])
            if leaving is not None:
                leaving.targets = targets
                self.revocations.when_acked(targets, partial(self._on_acked, leaving))
        self._untold.pop(cache_id, None)

    def _on_acked(self, leaving: Leaving) -> None:
        leaving.released_by_peers.set()
        self._state.post(lambda: self._free_if_unused(leaving.cache.cache_id))

    def _free_if_unused(self, cache_id: int) -> None:
        self._in_use[cache_id] = None
        leaving = self._leaving.get(cache_id)
        if leaving is not None and cache_id not in self._caches:
            if leaving.cache.pins:
                return
            self._free(leaving)
        self._in_use.pop(cache_id, None)

    def _free(self, leaving: Leaving) -> None:
        """Its memory returns, unless peers have not let go of it yet, or may still write to it."""
        leaving.idle.set()
        cache, cache_id = leaving.cache, leaving.cache.cache_id
        if leaving.released_by_peers.is_set() and not leaving.waited_for:
            again = partial(self._state.post, partial(self._free_if_unused, cache_id))
            if self._memory.quarantine.defers(cache.layout.ranges, again):
                return
            if cache.pooled:
                self._memory.give_back(cache.layout.placement, cache_id, cache.runs)
            else:
                self._memory.unregister_later(cache.regions, cache_id, cache.tensors.clear)
            self._leaving.pop(cache_id, None)


def _not_here(cache_id: int) -> LLMException:
    return LLMException(
        f"cache {cache_id} does not exist in this engine: it was freed, or never allocated or "
        "registered here",
        status_code=LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
    )


def describe(name: KeyName) -> str:
    """A key for people."""
    if name.space == "blocks":
        return f"blocks key, model_id {name.model}"
    label = "req_id" if name.space == "request" else "prefix_id"
    key = "INVALID_ID" if name.key == INVALID_ID else name.key
    return f"{label} {key}, model_id {name.model}"


def _how_to_unbind(name: KeyName) -> str:
    """Keys of contiguous caches outlive deallocate_cache (LLM-DataDist API, reference counting)."""
    return "free that cache" if name.space == "blocks" else "call remove_cache_key"

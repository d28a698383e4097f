"""Our own caches and keys, and their publication to linked peers.

Reference counting (LLM-DataDist API, caches): a pool-owned cache is referenced by its id and by
each key bound to one of its slots; its memory returns when all are gone, peers have let go of it
and no local transfer uses it. Registered memory stays the caller's.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from datadist.base.coverage import Coverage
from datadist.caches.directory import KeyDirectory, KeyName
from datadist.caches.memory import Memory
from datadist.caches.peers import TOKENS, PeerView
from datadist.caches.revocations import Revocations
from datadist.control.account import MAX_CACHES, MAX_TENSORS
from datadist.control.account import MAX_KEYS as MAX_ALL_KEYS
from datadist.control.messages import MAX_KEYS, Binding, Directory, Entry, Message
from datadist.status import LLMException, LLMStatusCode, param_invalid
from datadist.transport import Placement
from datadist.types import INVALID_ID

_Tensors: TypeAlias = "tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]"

ENTRY_BYTES, BASE_BYTES, KEY_BYTES = 256, 48, 160
"""Most bytes in a message of an entry, of a tensor with its region in it, and of a key in it."""
PART_BYTES = 2 << 20
"""Bytes after which the next entry comes in another message of the directory."""


@dataclass(frozen=True)
class Layout:
    """Where a cache lies: one base address per tensor, ``count`` slots or blocks of ``stride`` bytes."""

    blocks: bool
    bases: tuple[int, ...]
    stride: int
    count: int
    tensor_size: int
    placement: Placement
    data_type: int
    """Number of a :class:`~datadist.types.DataType`."""

    def __post_init__(self) -> None:
        """Raises LLM_PARAM_INVALID for memory that no address reaches."""
        last = max(self.bases)
        if last + self.tensor_size >= 1 << 63:
            raise param_invalid(f"{self.tensor_size} bytes at {last:#x} end beyond any address")


@dataclass(eq=False)
class OwnCache:
    """A cache of this engine."""

    cache_id: int
    layout: Layout
    pooled: bool
    accessible: bool
    regions: tuple[int, ...]
    bindings: dict[int, Binding] = field(default_factory=dict)
    covered: dict[int, Coverage] = field(default_factory=dict)
    """Tensors that peers have pulled, per binding."""
    held: bool = True
    """Whether the id still references it."""
    pins: set[int] = field(default_factory=set)
    """Of the local transfers that use the memory, by token: adding and discarding need no lock."""
    let_go: bool = False
    """Whether peers have let go of it."""

    def entry(self) -> Entry:
        """What peers are told."""
        layout = self.layout
        return Entry(
            cache_id=self.cache_id,
            blocks=layout.blocks,
            bases=list(layout.bases),
            stride=layout.stride,
            count=layout.count,
            tensor_size=layout.tensor_size,
            data_type=layout.data_type,
            placement=layout.placement,
            pooled=self.pooled,
            accessible=self.accessible,
            regions=sorted(set(self.regions)),
            bindings=list(self.bindings.values()),
        )


class OwnDirectory:
    """Caches by id and key; every change is published to the subscribed peers, in order."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._lock = threading.RLock()
        self._unpinned = threading.Condition(self._lock)
        self._caches: dict[int, OwnCache] = {}
        self._index = KeyDirectory()
        self._cache_ids = itertools.count(1)
        self._binding_ids = itertools.count(1)
        self._changes = 0
        """Counts what changes :meth:`caches_at`."""
        self._sorted: tuple[tuple[int, bool, int | None], _Tensors] | None = None
        self._views: set[PeerView] = set()
        """Subscribed, or with something unacknowledged."""
        self.revocations = Revocations()

    # -- local changes -----------------------------------------------------------------------

    def new_id(self) -> int:
        """The next cache id; ids start at 1 and are never reused."""
        return next(self._cache_ids)

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
        with self._lock:
            if unique:
                for slot, name in keys:
                    self._check_unbound(slot, name)
            self._check_room(cache, len(bindings))
            cache.bindings.update(bindings)
            self._caches[cache.cache_id] = cache
            self._changes += 1
            try:
                self._update(cache)
            except BaseException:
                self._forget(cache.cache_id)
                raise

    def _check_room(self, cache: OwnCache, keys: int) -> None:
        tensors = len(cache.layout.bases)
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
        with self._lock:
            return self._index.find(name) is not None

    def _check_unbound(self, slot: int, name: KeyName) -> None:
        found = self._index.find(name)
        if found is not None:
            raise param_invalid(
                f"key {slot} ({describe(name)}) is bound to cache {found[0].cache_id} already: "
                f"{_how_to_unbind(name)} first, or use another key"
            )

    def get(self, cache_id: int) -> OwnCache | None:
        """The cache of an id, or None."""
        return self._caches.get(cache_id)

    @contextmanager
    def pinned(self, cache_id: int, freed_too: bool = False) -> Iterator[OwnCache]:
        """Keep the memory of a cache while a local transfer uses it.

        ``freed_too``: also one whose id was freed, as long as keys keep it.

        Raises LLM_KV_CACHE_NOT_EXIST.
        """
        cache, token = self._caches.get(cache_id), next(TOKENS)
        try:
            if cache is None or not self.pin(cache, token, freed_too):
                raise _not_here(cache_id)
            yield cache
        finally:
            if cache is not None:
                cache.pins.discard(token)  # in C: no handler of a signal comes before that
                self.unpin(cache, token)

    def pin(self, cache: OwnCache, token: int, freed_too: bool = False) -> bool:
        """Keep the memory of a cache until :meth:`unpin`; False where it does not exist any more.

        ``token`` is the next of :data:`TOKENS`. Takes no lock: a cache is pinned before it is looked
        at once more, and leaves the directory before anybody looks for pins, so one of the two sees
        the other.
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
        if cache.cache_id not in self._caches:  # somebody waits to free it
            with self._lock:
                self._free_if_unused(cache)

    def caches_at(
        self, addresses: NDArray[np.int64], lengths: NDArray[np.int64], freed_too: bool = False,
        data_type: int | None = None,
    ) -> set[int]:  # fmt: skip
        """The live caches that hold these ranges, each range within one tensor.

        ``freed_too`` as in :meth:`pinned`. ``data_type``: only caches of that type.

        Raises LLM_PARAM_INVALID for the first range that no tensor holds.
        """
        base, size, cache_ids = self._all_tensors(freed_too, data_type)
        end = base + size
        # ranges may contain others, so of those that begin before an address the farthest counts
        place = np.arange(len(end))
        farthest = np.maximum.accumulate(np.where(end == np.maximum.accumulate(end), place, 0))
        before = np.searchsorted(base, addresses, side="right") - 1
        place = farthest[before]
        good = (before >= 0) & (lengths > 0) & (addresses - base[place] <= size[place] - lengths)
        if not good.all():
            bad = int(np.flatnonzero(~good)[0])
            raise param_invalid(
                f"the {int(lengths[bad])} bytes at {int(addresses[bad]):#x} are not inside one tensor "
                "of a live cache of this engine"
            )
        return {int(cache_id) for cache_id in np.unique(cache_ids[place])}

    def _all_tensors(self, freed_too: bool, data_type: int | None) -> _Tensors:
        """Sorted once for all that is asked between two changes, and not under the lock."""
        which = self._changes, freed_too, data_type
        known = self._sorted
        if known is not None and known[0] == which:
            return known[1]
        with self._lock:
            caches = list(self._caches.values())
        if not freed_too:
            caches = [cache for cache in caches if cache.held]
        if data_type is not None:
            caches = [cache for cache in caches if cache.layout.data_type == data_type]
        tensors = _tensors(caches)
        self._sorted = which, tensors
        return tensors

    def deallocate(self, cache_id: int) -> None:
        """Drop the id's reference to a pool-owned cache; blocks caches lose their key with it."""
        with self._lock:
            cache = self._caches.get(cache_id)
            if cache is None or not cache.pooled:
                return
            cache.held = False
            self._changes += 1
            if cache.layout.blocks:
                cache.bindings.clear()
            if not cache.bindings:
                self._drop(cache)

    def remove_key(self, name: KeyName) -> None:
        """Unbind a key of a pool-owned cache; anything else is left alone."""
        with self._lock:
            found = self._index.find(name)
            cache = self._caches.get(found[0].cache_id) if found else None
            if found is not None and cache is not None and cache.pooled:
                self._unbind(cache, found[1].id)

    def unregister(self, cache_id: int, timeout: float, certain: bool) -> None:
        """Forget a cache, keys included; pool-owned memory returns, registered is let go.

        With ``certain``, where peers may write: waits up to ``timeout`` seconds until no peer can be
        inside registered memory, and raises LLM_FAILED, keeping the cache, when one may be.
        """
        with self._lock:
            cache = self._caches.get(cache_id)
            if cache is None:
                return
            if cache.pooled:
                cache.held = False
                cache.bindings.clear()
                self._drop(cache)
                return
        self._check_settled(cache)
        with self._lock:
            if cache_id not in self._caches:
                return
            targets = self._forget(cache_id)
        gone = threading.Event()
        self.revocations.when_acked(targets, gone.set)
        if not gone.wait(timeout) and certain:
            self._refuse_late(cache, targets)
        with self._lock:
            while cache.pins:  # local transfers, which have deadlines of their own
                self._unpinned.wait(timeout)
        try:
            self._check_settled(cache)  # one that was pinned may have left something
        except LLMException:
            self._restore(cache)
            raise
        self._memory.unregister(cache.regions)

    def _check_settled(self, cache: OwnCache) -> None:
        kept = self._memory.quarantine.touching(cache.layout.bases, cache.layout.tensor_size)
        if kept is not None:
            raise LLMException(
                f"cache {cache.cache_id} stays registered: {kept} (a page does not come: userfaultfd, "
                "or a file system that hangs); do not free that memory, and try again when the page "
                "has come or the peer has ended",
                status_code=LLMStatusCode.LLM_FAILED,
            )

    def _restore(self, cache: OwnCache) -> None:
        with self._lock:
            self._caches[cache.cache_id] = cache
            self._changes += 1
            self._update(cache)

    def _refuse_late(self, cache: OwnCache, targets: dict[PeerView, int]) -> None:
        late = [
            f"cluster {view.session.cluster_id} ({view.session.peer})"
            for view, seq in targets.items()
            if view.seq_acked < seq and not view.gone
        ]
        self._restore(cache)
        raise LLMException(
            f"cache {cache.cache_id} stays registered: {', '.join(late)} did not confirm that it "
            "has stopped writing (is it stopped?); try again when it answers or has ended",
            status_code=LLMStatusCode.LLM_FAILED,
        )

    def clear(self) -> None:
        """Forget everything (finalize)."""
        with self._lock:
            self._caches.clear()
            self._changes += 1
            self._index.replace_all([])
            self._views.clear()

    # -- peers -------------------------------------------------------------------------------

    def consumed(self, cache_id: int, binding_id: int, start: int, stop: int) -> None:
        """A peer has pulled tensors ``[start, stop)`` of a slot by its key."""
        with self._lock:
            cache = self._caches.get(cache_id)
            if cache is None or not cache.pooled or binding_id not in cache.bindings:
                return
            tensors = len(cache.layout.bases)
            covered = cache.covered.setdefault(binding_id, Coverage())
            covered.add(start, min(stop, tensors))
            if covered.is_all(tensors):
                self._unbind(cache, binding_id)

    def subscribe(self, view: PeerView) -> None:
        """Send everything to a peer now, and changes from now on."""
        with self._lock:
            if view.subscribed:
                return
            view.subscribed = True
            self._views.add(view)
            parts = list(_parts([cache.entry() for cache in self._caches.values()]))
            for number, part in enumerate(parts, 1):
                self._send(view, part, [], reset=number == 1, last=number == len(parts))

    def unsubscribe_unless(self, view: PeerView, linked: bool) -> None:
        """Stop sending changes to a peer that no link needs them for."""
        if not linked:
            with self._lock:
                view.subscribed = False

    def send_revocation(self, view: PeerView, make: Callable[[int], Message]) -> None:
        """Send a message that the peer acknowledges once none of its pulls is in its way."""
        with self._lock:
            view.seq_sent += 1
            self._views.add(view)
            view.send(make(view.seq_sent))

    def suspect(self, view: PeerView) -> None:
        """A peer's session is over, but it may still write: until :meth:`on_gone` nothing returns."""
        with self._lock:
            view.subscribed = False
            view.seq_sent += 1  # which it cannot acknowledge
            self._views.add(view)

    def on_gone(self, view: PeerView) -> None:
        """A peer's session is over, and nothing of it touches our memory."""
        with self._lock:
            view.subscribed = False
            view.gone = True
            self._views.discard(view)
        self.revocations.on_gone(view)

    def _unbind(self, cache: OwnCache, binding_id: int) -> None:
        cache.bindings.pop(binding_id, None)
        cache.covered.pop(binding_id, None)
        if cache.held or cache.bindings:
            self._index.unbind(cache.cache_id, binding_id)
            self._publish([], [], [(cache.cache_id, binding_id)])
        else:
            self._drop(cache)

    def _update(self, cache: OwnCache) -> None:
        entry = cache.entry()
        self._index.put(entry)
        self._publish([entry], [])

    def _drop(self, cache: OwnCache) -> None:
        self._memory.expect(cache.layout.placement, len(cache.layout.bases))
        targets = self._forget(cache.cache_id)

        def let_go() -> None:
            with self._lock:
                cache.let_go = True
                self._free_if_unused(cache)

        self.revocations.when_acked(targets, let_go)

    def _forget(self, cache_id: int) -> dict[PeerView, int]:
        """Take a cache out of the directory; returns what each peer must acknowledge."""
        del self._caches[cache_id]
        self._changes += 1
        self._index.remove(cache_id)
        return self._publish([], [cache_id])

    def _free_if_unused(self, cache: OwnCache) -> None:
        self._unpinned.notify_all()
        if cache.let_go and not cache.pins:
            layout = cache.layout
            if self._memory.quarantine.defers(
                layout.bases, layout.tensor_size, partial(self._free_later, cache)
            ):
                return
            cache.let_go = False
            self._memory.give_back(cache.layout.placement, cache.layout.bases)

    def _free_later(self, cache: OwnCache) -> None:
        with self._lock:
            self._free_if_unused(cache)

    def _publish(
        self, upsert: list[Entry], remove: list[int], unbind: Sequence[tuple[int, int]] = ()
    ) -> dict[PeerView, int]:
        """Send a change to every subscriber; returns what each peer must acknowledge."""
        targets = {}
        for view in list(self._views):
            if view.subscribed:
                self._send(view, upsert, remove, unbind)
            elif view.seq_acked >= view.seq_sent:
                self._views.discard(view)
                continue
            targets[view] = view.seq_sent
        return targets

    @staticmethod
    def _send(
        view: PeerView,
        upsert: list[Entry],
        remove: list[int],
        unbind: Sequence[tuple[int, int]] = (),
        reset: bool = False,
        last: bool = True,
    ) -> None:
        view.seq_sent += 1
        view.send(
            Directory.model_construct(
                seq=view.seq_sent,
                reset=reset,
                last=last,
                upsert=upsert,
                remove=remove,
                unbind=list(unbind),
            )
        )


def _parts(entries: list[Entry]) -> Iterator[list[Entry]]:
    """``entries`` in portions of bounded size; at least one, which may be empty."""
    part: list[Entry] = []
    size = 0
    for entry in entries:
        more = ENTRY_BYTES + BASE_BYTES * len(entry.bases) + KEY_BYTES * len(entry.bindings)
        if part and size + more > PART_BYTES:
            yield part
            part, size = [], 0
        part.append(entry)
        size += more
    yield part


def _tensors(caches: Sequence[OwnCache]) -> _Tensors:
    """Address, bytes and cache id of every tensor, by address; never empty."""
    layouts = [cache.layout for cache in caches]
    counts = [len(layout.bases) for layout in layouts]
    base = np.fromiter(chain.from_iterable(layout.bases for layout in layouts), np.int64)
    size = np.repeat(np.array([layout.tensor_size for layout in layouts], np.int64), counts)
    cache_ids = np.repeat(np.array([cache.cache_id for cache in caches], np.int64), counts)
    order = np.lexsort((cache_ids, size, base))
    if not len(order):
        return np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64)
    return base[order], size[order], cache_ids[order]


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

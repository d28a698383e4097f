"""Entries of caches and the index of their keys; one for ourselves, one copy per linked peer.

Identity of keys (LLM-DataDist API, cache keys): a request key is (req_id, model_id), a prefix key
(prefix_id, model_id), a blocks key model_id alone. Of several bindings of one key, the first wins
for contiguous caches and the last for blocks caches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal, NamedTuple

from datadist.control.messages import Binding, Entry

Space = Literal["request", "prefix", "blocks"]


class KeyName(NamedTuple):
    """What identifies a key on its owner."""

    space: Space
    key: int
    model: int


def name_of(binding: Binding) -> KeyName:
    """The key that a binding binds."""
    return KeyName(binding.space, binding.key, binding.model)


class KeyDirectory:
    """Caches by id and by key. Not locked: the holder serialises changes and look-ups.

    A change costs as much as what it names, however many caches and keys there are. One that an
    exception interrupted is completed by :meth:`put` or :meth:`remove` of the same cache.
    """

    def __init__(self) -> None:
        self.entries: dict[int, Entry] = {}
        """Without their bindings: see :meth:`bindings`."""
        self._bindings: dict[int, dict[int, Binding]] = {}
        """By cache id and id."""
        self._index: dict[KeyName, dict[tuple[int, int], Binding]] = {}
        """By what they bind, then by cache id and id, in the order in which they came."""
        self._requests: dict[int, dict[int, dict[int, Binding]]] = {}
        """Request keys by slot and id, of the caches that were asked for them."""
        self.keys = 0
        """Of all caches."""
        self.tensors = 0
        """Of all caches; their regions, where these are more."""

    def put(self, entry: Entry) -> set[int]:
        """Add or replace the entry of a cache; the ids of the bindings that are gone with that.

        Of bindings with one id the first counts.
        """
        gone = self.remove(entry.cache_id)
        bindings: dict[int, Binding] = {}
        for binding in entry.bindings:
            bindings.setdefault(binding.id, binding)
        kept = entry.model_copy(update={"bindings": []}) if bindings else entry
        tensors, keys = _tensors(entry), len(bindings)
        self.tensors += tensors  # nothing is called, so nothing interrupts, up to the next line
        self.entries[entry.cache_id] = kept
        self.keys += keys
        self._bindings[entry.cache_id] = bindings
        for binding in bindings.values():
            named = self._index.setdefault(name_of(binding), {})
            named[entry.cache_id, binding.id] = binding
        return gone.difference(bindings)

    def remove(self, cache_id: int) -> set[int]:
        """Forget a cache; the ids of its bindings. Harmless when it is not there."""
        bindings = self._bindings.get(cache_id)
        if bindings is not None:
            for binding in bindings.values():
                self._forget_name(cache_id, binding)
            keys = len(bindings)
            self.keys -= keys
            del self._bindings[cache_id]
        self._requests.pop(cache_id, None)
        entry = self.entries.get(cache_id)
        if entry is not None:
            tensors = _tensors(entry)
            self.tensors -= tensors
            del self.entries[cache_id]
        return set(bindings or ())

    def unbind(self, cache_id: int, binding_id: int) -> None:
        """Forget one key of a cache; harmless when it is not there."""
        bindings = self._bindings.get(cache_id, {})
        binding = bindings.get(binding_id)
        if binding is not None:
            self._forget_name(cache_id, binding)
            self._requests.get(cache_id, {}).get(binding.slot, {}).pop(binding_id, None)
            self.keys -= 1
            del bindings[binding_id]

    def _forget_name(self, cache_id: int, binding: Binding) -> None:
        name = name_of(binding)
        named = self._index.get(name, {})
        named.pop((cache_id, binding.id), None)
        if not named:
            self._index.pop(name, None)

    def replace_all(self, entries: Iterable[Entry]) -> None:
        """Forget everything, then take ``entries``."""
        self.clear()
        for entry in entries:
            self.put(entry)

    def clear(self) -> None:
        """Forget everything."""
        self.entries.clear()
        self._bindings.clear()
        self._index.clear()
        self._requests.clear()
        self.keys = self.tensors = 0

    def find(self, name: KeyName, ignoring: Collection[int] = ()) -> tuple[Entry, Binding] | None:
        """The entry and binding of a key; bindings with an id in ``ignoring`` do not count."""
        named = self._index.get(name, {})
        for place in reversed(named) if name.space == "blocks" else named:
            if place[1] not in ignoring:
                return self.entries[place[0]], named[place]
        return None

    def request_at(self, cache_id: int, slot: int, ignoring: Collection[int]) -> Binding | None:
        """The first request key on a slot of a cache, as :meth:`find` does it."""
        if cache_id not in self._requests:
            by_slot: dict[int, dict[int, Binding]] = {}
            for binding in self.bindings(cache_id):
                if binding.space == "request":
                    by_slot.setdefault(binding.slot, {})[binding.id] = binding
            self._requests[cache_id] = by_slot
        on_slot = self._requests[cache_id].get(slot, {})
        return next((b for number, b in on_slot.items() if number not in ignoring), None)

    def bindings(self, cache_id: int) -> list[Binding]:
        """The keys of a cache, in the order in which they were bound."""
        return list(self._bindings.get(cache_id, {}).values())

    def binding_ids(self) -> set[int]:
        """Ids of all bindings."""
        return {number for bindings in self._bindings.values() for number in bindings}


def _tensors(entry: Entry) -> int:
    return max(len(entry.bases), len(entry.regions))

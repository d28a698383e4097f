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
    """Caches by id and by key. Not locked: the holder serialises changes and look-ups."""

    def __init__(self) -> None:
        self.entries: dict[int, Entry] = {}
        self._index: dict[KeyName, list[tuple[int, Binding]]] = {}

    def put(self, entry: Entry) -> None:
        """Add or replace the entry of a cache."""
        self.remove(entry.cache_id)
        self.entries[entry.cache_id] = entry
        for binding in entry.bindings:
            self._index.setdefault(name_of(binding), []).append((entry.cache_id, binding))

    def remove(self, cache_id: int) -> None:
        """Forget a cache; harmless when it is not there."""
        entry = self.entries.pop(cache_id, None)
        for binding in entry.bindings if entry else ():
            name = name_of(binding)
            left = [item for item in self._index.pop(name, ()) if item[0] != cache_id]
            if left:
                self._index[name] = left

    def unbind(self, cache_id: int, binding_id: int) -> None:
        """Forget one key of a cache; harmless when it is not there."""
        entry = self.entries.get(cache_id)
        for place, binding in enumerate(entry.bindings if entry else ()):
            if entry is not None and binding.id == binding_id:
                del entry.bindings[place]
                name = name_of(binding)
                left = [item for item in self._index.pop(name, ()) if item[1].id != binding_id]
                if left:
                    self._index[name] = left
                return

    def replace_all(self, entries: Iterable[Entry]) -> None:
        """Forget everything, then take ``entries``."""
        self.entries.clear()
        self._index.clear()
        for entry in entries:
            self.put(entry)

    def find(self, name: KeyName, ignoring: Collection[int] = ()) -> tuple[Entry, Binding] | None:
        """The entry and binding of a key; bindings with an id in ``ignoring`` do not count."""
        found = [item for item in self._index.get(name, ()) if item[1].id not in ignoring]
        if not found:
            return None
        cache_id, binding = found[-1] if name.space == "blocks" else found[0]
        return self.entries[cache_id], binding

    def binding_ids(self) -> set[int]:
        """Ids of all bindings."""
        return {item[1].id for items in self._index.values() for item in items}

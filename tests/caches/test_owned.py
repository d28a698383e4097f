"""Our own caches and keys: what is kept, what peers are told (owned.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import pytest

from datadist import CacheKey, LLMException, LLMStatusCode
from datadist.base.range_set import RangeSet
from datadist.caches import owned as owned_caches
from datadist.caches.directory import KeyName
from datadist.caches.memory import Memory
from datadist.caches.owned import Layout, OwnCache, OwnDirectory
from datadist.caches.peers import PeerView
from datadist.control.messages import (
    HEADER,
    MAX_FRAME,
    MAX_KEYS,
    Binding,
    Directory,
    Message,
    decode,
    encode,
)
from datadist.control.session import Session
from datadist.transport import Placement
from tests import nodes
from tests.nodes import Node, RemoteError

Start = Callable[..., Node]
LARGEST = (1 << 64) - 1
LONGEST_TYPE = (1 << 32) - 1


class _Peer:
    """A session that keeps the size of what it was to send, and may break down."""

    def __init__(self) -> None:
        self.frames: list[int] = []
        self.said: list[Directory] = []
        self.closed = False
        self.broken = False

    def send(self, message: Message) -> None:
        if self.broken:
            self.broken = False
            raise MemoryError
        frame = encode(message)
        self.frames.append(len(frame))
        if isinstance(message, Directory):
            said = decode(frame[HEADER.size :])
            assert isinstance(said, Directory)
            self.said.append(said)

    send_soon = send


def _subscribed(owned: OwnDirectory) -> _Peer:
    peer = _Peer()
    owned.publication.subscribe(PeerView(cast("Session", peer)))
    return peer


def _cache(cache_id: int, bases: tuple[int, ...], size: int = 1) -> OwnCache:
    layout = Layout(False, bases, size, 1, size, Placement.HOST, LONGEST_TYPE)
    return OwnCache(cache_id, layout, pooled=False, accessible=False, regions=bases)


def _owned() -> OwnDirectory:
    return OwnDirectory(cast("Memory", None))


def _full(cache_id: int) -> OwnCache:
    """As much as one cache can have, in the longest digits."""
    cache = _cache(cache_id, tuple(range(1 << 62, (1 << 62) + (1 << 16))))
    cache.bindings = {
        number: Binding(id=number, slot=LARGEST, space="request", key=LARGEST, model=LARGEST)
        for number in range(LARGEST - MAX_KEYS, LARGEST)
    }
    return cache


def _many(start: int, stop: int) -> list[OwnCache]:
    return [_cache((1 << 62) + number, ((1 << 62) + number,)) for number in range(start, stop)]


@pytest.mark.parametrize(
    "make",
    [lambda: _many(0, 100_000), lambda: [*_many(0, 1), _full(LARGEST), *_many(1, 34_000)]],
    ids=["many", "large"],
)
def test_all_that_is_known_comes_in_messages_that_a_peer_accepts(
    make: Callable[[], list[OwnCache]],
) -> None:
    owned = _owned()
    for cache in make():
        owned.add(cache, [], unique=False)
    frames = _subscribed(owned).frames
    assert len(frames) > 1
    assert max(frames) < MAX_FRAME


def test_a_cache_with_too_many_keys_is_not_kept() -> None:
    owned = _owned()
    keys = [(slot, KeyName("request", slot, 0)) for slot in range(MAX_KEYS + 1)]
    with pytest.raises(LLMException, match=r"65537 cache keys.*at most 65536") as caught:
        owned.add(_cache(1, (7,)), keys, unique=True)
    assert caught.value.status_code.name == "LLM_PARAM_INVALID"
    assert owned.get(1) is None
    assert not owned.bound(keys[0][1])
    owned.add(_cache(2, (7,)), keys[:1], unique=True)


def test_a_cache_that_cannot_be_published_is_not_kept() -> None:
    owned = _owned()
    peer = _subscribed(owned)
    peer.broken = True
    key = KeyName("request", 1, 0)
    with pytest.raises(MemoryError):
        owned.add(_cache(1, (7,)), [(0, key)], unique=True)
    assert owned.get(1) is None
    assert not owned.bound(key)


def test_memory_that_ends_beyond_int64_is_refused() -> None:
    with pytest.raises(LLMException, match="0x7ffffffffffffff8"):
        _cache(1, (8, (1 << 63) - 8), 8)


def test_keys_of_a_linked_engine(start_node: Start) -> None:
    owner = start_node(1)
    puller = start_node(2, sync_kv_timeout=55_000)  # for the pull that hears of all keys first
    nodes.link_pair(owner, puller)
    puller.do(nodes.make, "dst", "cache", [1, 4], 1)
    pages = owner.do(_pages_used)
    with pytest.raises(RemoteError, match="260000 cache keys") as caught:
        owner.do(_make_with_keys, "too many", 260_000)
    assert caught.value.status == "LLM_PARAM_INVALID"
    assert owner.do(_pages_used) == pages
    owner.do(_make_with_keys, "src", MAX_KEYS)
    owner.do(nodes.fill, "src", 5)
    puller.do(nodes.pull_cache, CacheKey(1, LARGEST - MAX_KEYS), "dst")
    expected = nodes.pattern(5, 0, (MAX_KEYS, 4))
    assert (puller.do(nodes.read, "dst")[0][0] == expected[-1]).all()


def _make_with_keys(here: nodes.Here, label: str, count: int) -> None:
    from datadist import CacheDesc, DataType

    keys = [CacheKey(1, LARGEST - 1 - slot) for slot in range(count)]
    cache = here.live.cache_manager.allocate_cache(
        CacheDesc(1, [count, 4], DataType.DT_INT32), keys
    )
    here.caches[label], here.arrays[label] = cache, cache.numpy()


def _pages_used(here: nodes.Here) -> int:
    return int(here.live.stats()["pools"]["DEVICE"]["pages_used"])


def test_the_cache_around_another_one_is_found() -> None:
    owned = _owned()
    for cache_id, base, size in ((1, 1000, 1000), (2, 1500, 100), (3, 1500, 50), (4, 3000, 10)):
        owned.add(_cache(cache_id, (base,), size), [], unique=False)

    def at(address: int, length: int) -> set[int]:
        return owned.caches_at(np.array([address]), np.array([length]))

    assert at(1700, 10) == at(1000, 1000) == at(1590, 20) == {1}
    assert at(3000, 10) == {4}
    assert at(1520, 40) <= {1, 2}
    for address, length in ((999, 1), (1700, 301), (1999, 2), (2500, 1), (3000, 11), (3001, 10)):
        with pytest.raises(LLMException, match=f"at {address:#x} are not inside one tensor"):
            at(address, length)


def test_a_key_that_is_gone_is_told_without_the_others() -> None:
    owned = _owned()
    peer = _subscribed(owned)
    cache = _cache(1, (7,))
    cache.pooled = True
    names = [KeyName("request", number, 0) for number in range(1000)]
    owned.add(cache, list(enumerate(names)), unique=True)
    assert peer.frames[-1] > 50_000
    owned.remove_key(names[3])
    (binding,) = [b for b in cache.bindings.values() if b.key == 4]
    owned.consumed(1, binding.id, 0, 1)
    assert max(peer.frames[-2:]) < 300
    assert [owned.bound(name) for name in names[2:6]] == [True, False, False, True]


def test_what_a_peer_hears_of_a_key_that_is_gone() -> None:
    owned, view = _owned(), PeerView(cast("Session", _Peer()))
    cache = _cache(1, (7,))
    cache.pooled = True
    names = [KeyName("request", number, 0) for number in range(3)]
    peer = _subscribed(owned)
    owned.add(cache, list(enumerate(names)), unique=True)
    for message in peer.said:
        view.apply(message)
    first, second, third = cache.bindings
    view.consumed, view.covered = {first, second}, {third: RangeSet()}
    view.covered[third].add(0, 1)
    owned.remove_key(names[0])
    view.apply(peer.said[-1])
    assert [view.directory.find(name) is None for name in names] == [True, False, False]
    assert view.directory.bindings(1) == [cache.bindings[second], cache.bindings[third]]
    assert view.consumed == {second}
    assert view.covered[third].ranges == [(0, 1)]


def test_memory_of_a_cache_that_is_refused_is_let_go(start_node: Start) -> None:
    node = start_node(1)
    before = node.do(_regions)
    with pytest.raises(RemoteError, match="65537 cache keys"):
        node.do(_register_with_keys, MAX_KEYS + 1)
    assert node.do(_regions) == before


def _register_with_keys(here: nodes.Here, count: int) -> None:
    keys = [CacheKey(1, slot) for slot in range(count)]
    nodes.make(here, "refused", "cache", [count, 1], 1, keys, memory="numpy")


def _regions(here: nodes.Here) -> int:
    engine = here.live._engine
    assert engine is not None
    return len(engine.memory._held)


# -- what peers say that they have pulled --------------------------------------------------------


def _keyed(tensors: int, pooled: bool) -> tuple[OwnDirectory, OwnCache, int]:
    """A cache whose request key is bound, and the id of that binding."""
    owned = _owned()
    cache = _cache(1, tuple(range(7, 7 + tensors)))
    cache.pooled = pooled
    owned.add(cache, [(0, KEY)], unique=True)
    (binding,) = cache.bindings
    return owned, cache, binding


KEY = KeyName("request", 1, 0)


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (0, LARGEST), (0, 1 << 40)])
def test_registered_caches_keep_their_keys(start: int, stop: int) -> None:
    owned, cache, binding = _keyed(3, pooled=False)
    peer = _subscribed(owned)
    before = len(peer.frames)
    owned.consumed(1, binding, start, stop)
    assert owned.bound(KEY)
    assert not cache.covered
    assert len(peer.frames) == before


@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, 0), (2, 1), (3, 3), (3, LARGEST), (LARGEST, LARGEST), (LARGEST, 0), (1, 3), (1, LARGEST),
     (0, 2), (2, 5)],
)  # fmt: skip
def test_ranges_that_leave_a_tensor_out_consume_nothing(start: int, stop: int) -> None:
    owned, _, binding = _keyed(3, pooled=True)
    for _ in range(3):
        owned.consumed(1, binding, start, stop)
    assert owned.bound(KEY)
    owned.consumed(1, binding, 0, 3)  # what came before does not hinder it
    assert not owned.bound(KEY)


@pytest.mark.parametrize("stop", [3, 4, 1 << 40, LARGEST])
def test_ranges_beyond_the_tensors_are_cut(stop: int) -> None:
    owned, cache, binding = _keyed(3, pooled=True)
    owned.consumed(1, binding, 1, stop)
    assert owned.bound(KEY)
    assert cache.covered[binding].ranges == [(1, 3)]
    owned.consumed(1, binding, 0, 1)
    assert not owned.bound(KEY)
    assert not cache.covered


def test_what_names_no_binding_of_the_cache_is_passed_over() -> None:
    owned, cache, binding = _keyed(3, pooled=True)
    other = _cache(2, (100,))
    other.pooled = True
    owned.add(other, [(0, KeyName("request", 2, 0))], unique=True)
    (others,) = other.bindings
    for cache_id, number in ((1, others), (2, binding), (3, binding), (1, LARGEST), (1, 0)):
        owned.consumed(cache_id, number, 0, 1)
        assert not cache.covered
        assert not other.covered
        owned.consumed(cache_id, number, 0, 3)
    assert owned.bound(KEY)
    assert owned.bound(KeyName("request", 2, 0))


def test_each_key_of_a_cache_is_counted_by_itself() -> None:
    owned, cache, first = _keyed(2, pooled=True)
    another = KeyName("request", 2, 0)
    cache.bindings[99] = Binding(id=99, slot=1, space="request", key=2, model=0)
    owned._index.put(cache.entry())
    owned.consumed(1, first, 0, 1)
    owned.consumed(1, 99, 1, 2)
    assert owned.bound(KEY)
    assert owned.bound(another)
    owned.consumed(1, 99, 0, 1)
    assert owned.bound(KEY)
    assert not owned.bound(another)


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("MAX_CACHES", "caches"),
        ("MAX_TENSORS", "tensors of caches"),
        ("MAX_ALL_KEYS", "cache keys"),
    ],
)
def test_what_peers_would_not_take_is_refused_here(
    monkeypatch: pytest.MonkeyPatch, limit: str, words: str
) -> None:
    """A peer would end its session with us, and with that our links."""
    monkeypatch.setattr(owned_caches, limit, 2)
    owned = _owned()
    peer = _subscribed(owned)
    for number in (1, 2):
        owned.add(_cache(number, (number,)), [(0, KeyName("request", number, 0))], True)
    told = len(peer.said)
    with pytest.raises(LLMException, match=f"this engine has 2 {words}, and with 1 more") as error:
        owned.add(_cache(3, (3,)), [(0, KeyName("request", 3, 0))], True)
    assert error.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert owned.get(3) is None
    assert not owned.bound(KeyName("request", 3, 0))
    assert len(peer.said) == told
    owned._remove(owned._caches[1])
    owned.add(_cache(3, (3,)), [(0, KeyName("request", 3, 0))], True)

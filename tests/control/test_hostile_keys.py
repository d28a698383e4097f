"""A peer that acknowledges what it never heard, and pulls of which it tells anything."""

from __future__ import annotations

import os

import numpy as np

from datadist import CacheDesc, CacheKey, DataType, LLMStatusCode, RegisterMemStatus
from datadist.caches.directory import KeyName
from datadist.control.messages import Ack, Consume, Directory, Mismatch, Sync
from datadist.engine.engine import Engine as Core
from tests import nodes
from tests.in_process_engine import BASE, PAIR, SIZE, TABLE, Engine
from tests.raw_peer import RawPeer, link, memory
from tests.waiting import until

LARGEST = (1 << 64) - 1
TENSORS = 3


def _core(engine: Engine) -> Core:
    return engine.api._live(LLMStatusCode.LLM_FAILED)


def _linked(engine: Engine) -> RawPeer:
    """A member that hears of our caches, and says nothing by itself."""
    raw_peer = engine.raw_peer()
    comm_id = engine.api.link("pair", PAIR, nodes.table_for(PAIR))
    fd = memory(SIZE)
    region = {"id": 1, "address": BASE, "size": SIZE, "fd": 0}
    offer = {"version": 1, "writable": False, "regions": [region], "fence": None}
    assert link(raw_peer, "pair", PAIR, TABLE, offer, [fd])
    os.close(fd)
    engine.api.wait_link(comm_id)
    return raw_peer


def _was_handled(raw_peer: RawPeer) -> None:
    """The engine has taken all that the raw peer has said."""
    raw_peer.say(Sync(id=7))
    assert raw_peer.hear("synced") is not None


def _pages(engine: Engine) -> int:
    return int(engine.api.stats()["pools"]["DEVICE"]["pages_used"])


def test_acknowledgements_of_the_future_free_nothing(engine: Engine) -> None:
    desc = CacheDesc(TENSORS, [1, 64], DataType.DT_UINT8)
    cache = engine.api.cache_manager.allocate_cache(desc)
    raw_peer = _linked(engine)
    before = _pages(engine)
    for seq in (1000, LARGEST):
        raw_peer.say(Ack(seq=seq))
    _was_handled(raw_peer)
    engine.api.cache_manager.deallocate_cache(cache)
    _was_handled(raw_peer)
    assert _pages(engine) == before
    (view,) = _core(engine).views.values()
    raw_peer.say(Ack(seq=view.seq_sent - 1))
    _was_handled(raw_peer)
    assert _pages(engine) == before
    raw_peer.say(Ack(seq=view.seq_sent))
    until(lambda: _pages(engine) == before - TENSORS)
    raw_peer.close()


def test_what_a_peer_says_that_it_pulled(engine: Engine) -> None:
    desc = CacheDesc(TENSORS, [1, 64], DataType.DT_UINT8)
    arrays = [np.zeros(64, np.uint8) for _ in range(TENSORS)]
    manager = engine.api.cache_manager
    pooled = manager.allocate_cache(desc, [CacheKey(1, 5)])
    registered = manager.register_cache(
        desc, [int(array.ctypes.data) for array in arrays], [CacheKey(1, 6)]
    )
    raw_peer = _linked(engine)
    told = raw_peer.hear("directory")
    assert isinstance(told, Directory)
    bindings = {entry.cache_id: entry.bindings[0].id for entry in told.upsert if entry.bindings}
    assert set(bindings) == {pooled.cache_id, registered.cache_id}

    def consume(cache_id: int, binding: int, start: int, stop: int) -> list[bool]:
        raw_peer.say(Consume(cache_id=cache_id, binding=binding, start=start, stop=stop))
        _was_handled(raw_peer)
        return [_core(engine).owned.bound(KeyName("request", key, 0)) for key in (5, 6)]

    both = [True, True]
    mine, theirs = bindings[pooled.cache_id], bindings[registered.cache_id]
    for start, stop in ((0, TENSORS), (0, LARGEST)):
        assert consume(registered.cache_id, theirs, start, stop) == both
        assert consume(registered.cache_id, mine, start, stop) == both
        assert consume(pooled.cache_id, theirs, start, stop) == both
        assert consume(LARGEST, mine, start, stop) == both
        assert consume(pooled.cache_id, LARGEST, start, stop) == both
    for start, stop in ((LARGEST, 0), (TENSORS, LARGEST), (LARGEST, LARGEST), (1, LARGEST)):
        assert consume(pooled.cache_id, mine, start, stop) == both
    assert consume(pooled.cache_id, mine, 0, LARGEST) == [False, True]
    assert consume(pooled.cache_id, mine, 0, LARGEST) == [False, True]
    engine.works()
    raw_peer.close()


def test_who_is_no_member_cannot_fail_a_link(engine: Engine) -> None:
    """Nor a member of another domain, though it knows the number of the link."""
    comm_id = engine.api.link("pair", PAIR, nodes.table_for(PAIR))
    raw_peer = engine.raw_peer(cluster=7)
    raw_peer.say(Mismatch(link=comm_id, reason="it says so"))
    _was_handled(raw_peer)
    assert engine.api.query_register_mem_status(comm_id) is RegisterMemStatus.PREPARING
    member = engine.raw_peer(1)
    member.say(Mismatch(link=comm_id, reason="it says so"))
    _was_handled(member)
    assert engine.api.query_register_mem_status(comm_id) is RegisterMemStatus.FAILED
    assert engine.api.link_error(comm_id) == "it says so"
    engine.api.unlink(comm_id)

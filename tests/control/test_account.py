"""What one peer may have of an engine: what is over ends its session, and nobody else notices."""

from __future__ import annotations

import re
import threading
import time
from base64 import b64encode
from collections.abc import Callable
from typing import Any

import pytest

from datadist import CacheDesc, DataType, LLMException, LLMStatusCode
from datadist.caches import owned
from datadist.control import account as accounts
from datadist.control.account import SLACK, Account, Item, LimitExceeded
from datadist.control.discovery import MAX_SESSIONS
from datadist.control.messages import Message, Notice
from tests import nodes
from tests.fuzz.templates import TOKEN
from tests.in_process_engine import PAIR, TABLE, Engine, entry_of, offer_of
from tests.raw_peer import link, memory

FEW = 3
INT64 = b64encode(bytes(8)).decode()


def _binding(number: int) -> dict[str, Any]:
    return {"id": number, "slot": 0, "space": "request", "key": number, "model": 0}


def _entries(**changes: Any) -> dict[str, Any]:
    entry = entry_of(**changes)
    upsert = [{**entry, "cache_id": n} for n in range(changes.pop("count_of", 1))]
    return {"kind": "directory", "seq": 1, "upsert": upsert}


def _wish(number: int, table: str = TABLE) -> dict[str, Any]:
    return {
        "kind": "announce", "link": number, "name": "x", "ranks": [[1, 0], [2, 1]], "table": table,
        "backend": "shm", "one_sided": False,
    }  # fmt: skip


def _offer(number: int, data: int = 0) -> dict[str, Any]:
    return {
        "kind": "offer", "domain": f"{number:032x}", "data": b64encode(bytes(data)).decode(),
        "fds": 0, "regions": [],
    }  # fmt: skip


def _caches(count: int) -> dict[str, Any]:
    return {"kind": "directory", "seq": 1, "upsert": [entry_of(cache_id=n) for n in range(count)]}


OVER: dict[str, tuple[Item, int, list[dict[str, Any]], int]] = {
    "caches": (Item.CACHES, FEW, [_caches(FEW), _caches(FEW + 1)], FEW + 1),
    "caches of a reset": (Item.CACHES, FEW, [{**_caches(FEW + 1), "reset": True}], FEW + 1),
    "keys": (
        Item.KEYS, FEW,
        [_entries(bindings=[_binding(n) for n in range(FEW)]),
         _entries(bindings=[_binding(n) for n in range(FEW + 1)])],
        FEW + 1,
    ),
    "tensors": (Item.TENSORS, FEW, [_entries(bases=[1 << 40] * (FEW + 1))], FEW + 1),
    "regions": (Item.TENSORS, FEW, [_entries(regions=list(range(FEW + 1)))], FEW + 1),
    "links": (Item.WISHES, FEW, [_wish(n) for n in range(FEW + 1)], FEW + 1),
    "tables": (
        Item.WISH_CHARACTERS, 5000, [_wish(n, "t" * 2000) for n in range(3)], 3 * 2001
    ),
    "offers": (Item.OFFERS, FEW, [_offer(n) for n in range(FEW + 1)], FEW + 1),
    "bytes of offers": (
        Item.OFFER_BYTES, 5000, [_offer(n, 2000) for n in range(3)], 6000
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", OVER)
def test_what_is_over_ends_that_session_and_no_other(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    item, limit, messages, count = OVER[what]
    monkeypatch.setattr(item, "limit", limit)
    honest, greedy = engine.raw_peer(1, cluster=3), engine.raw_peer(2)
    assert honest.hear("hello") is not None
    assert greedy.hear("hello") is not None
    for message in messages:
        greedy.say(message)
    assert greedy.closed(20)
    reason = f"it has {count} {item.words}, more than {limit}"
    assert engine.ended(reason), engine.ends()
    assert len([line for line in engine.log if "WARNING" in line and reason in line]) == 1
    honest.say({"kind": "sync", "id": 7})
    assert honest.hear("synced") is not None
    engine.works()


def test_what_was_given_back_does_not_count(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Item.CACHES, "limit", FEW)
    monkeypatch.setattr(Item.KEYS, "limit", FEW)
    monkeypatch.setattr(Item.WISHES, "limit", FEW)
    raw_peer = engine.raw_peer()
    for number in range(5 * FEW):
        entry = entry_of(cache_id=number, bindings=[_binding(2 * number), _binding(2 * number + 1)])
        raw_peer.say({"kind": "directory", "seq": 1, "upsert": [entry]})
        raw_peer.say({"kind": "directory", "seq": 2, "unbind": [[number, 2 * number]]})
        raw_peer.say({"kind": "directory", "seq": 3, "remove": [number]})
        raw_peer.say(_wish(number))
        raw_peer.say(_wish(number))
        raw_peer.say({"kind": "withdraw", "link": number})
    raw_peer.say({"kind": "sync", "id": 7})
    assert raw_peer.hear("synced") is not None


def _verify() -> dict[str, Any]:
    return {"kind": "verify", "id": 1, "address": INT64, "length": INT64, "seconds": 1.0}


def _dial() -> dict[str, Any]:
    return {"kind": "dial", "link": 9, "backend": "shm", "one_sided": False, "seconds": 1.0}


MORE: dict[Item, Callable[[], dict[str, Any] | Message]] = {
    Item.CACHES: lambda: _caches(1),
    Item.KEYS: lambda: _entries(bindings=[_binding(1)]),
    Item.TENSORS: lambda: _caches(1),
    Item.WISHES: lambda: _wish(9),
    Item.WISH_CHARACTERS: lambda: _wish(9),
    Item.OFFERS: lambda: _offer(9),
    Item.OFFER_BYTES: lambda: _offer(9, 100),
    Item.ENDING: _dial,
    Item.NOTICES: lambda: Notice(data=b"x"),
    Item.NOTICES_WITHOUT_CREDIT: lambda: Notice(data=b"x"),
    Item.REQUESTS: _verify,
    Item.REQUEST_BYTES: _verify,
}
"""A message by which a peer has more of each item."""


@pytest.mark.parametrize("item", Item)
def test_a_link_that_ends_so_says_why(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, item: Item
) -> None:
    raw_peer = engine.raw_peer()
    comm_id = engine.api.link("pair", PAIR, nodes.table_for(PAIR))
    assert link(raw_peer, "pair", PAIR, TABLE, offer_of(), [memory(1 << 16)])
    engine.api.wait_link(comm_id)
    limit = -1 if item is Item.ENDING else 0  # which the peer has none of, while none is slow
    monkeypatch.setattr(item, "limit", limit)
    raw_peer.say(MORE[item]())
    assert raw_peer.closed(20)
    deadline = time.monotonic() + 20
    while (why := engine.api.link_error(comm_id)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    words = rf"it has \d+ {re.escape(item.words)}, more than {limit}"
    assert re.search(words, why)
    assert [line for line in engine.log if "WARNING" in line and re.search(words, line)]
    engine.works()


@pytest.mark.parametrize("kind", ["fetch", "verify"])
def test_requests_that_wait_are_limited(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(Item.REQUESTS, "limit", 0)
    raw_peer = engine.raw_peer()
    request = {
        "fetch": {
            "kind": "fetch", "id": 1, "domain": TOKEN, "source": INT64, "target": INT64,
            "length": INT64, "data_type": 4, "same_type": False, "seconds": 2_000_000.0,
        },
        "verify": {
            "kind": "verify", "id": 1, "address": INT64, "length": INT64, "seconds": 2_000_000.0
        },
    }[kind]  # fmt: skip
    raw_peer.say(request)
    assert raw_peer.closed(20)
    assert engine.ended("it has 1 requests that are not answered yet, more than 0")
    engine.works()


def test_an_engine_permits_its_user_less_than_its_peers_take() -> None:
    assert Item.CACHES.limit - accounts.MAX_CACHES >= SLACK
    assert Item.KEYS.limit - accounts.MAX_KEYS >= SLACK
    assert Item.TENSORS.limit - accounts.MAX_TENSORS >= SLACK
    assert Item.WISH_CHARACTERS.limit > accounts.MAX_TABLES


def test_what_does_not_fit_is_not_counted() -> None:
    account = Account()
    account.take(Item.WISHES, Item.WISHES.limit)
    with pytest.raises(LimitExceeded, match="it has 1025 links that it waits for, more than 1024"):
        account.take(Item.WISHES)
    assert account[Item.WISHES] == 1024
    account.give_back(Item.WISHES, 2000)
    assert account[Item.WISHES] == 0


def test_a_process_has_so_many_sessions_and_no_more(engine: Engine) -> None:
    strangers = [engine.raw_peer(number, cluster=2 + number) for number in range(1, 30)]
    for raw_peer in strangers:
        raw_peer.say({"kind": "sync", "id": 7})
    kept = [raw_peer for raw_peer in strangers if raw_peer.hear("synced") is not None]
    assert len(kept) == MAX_SESSIONS
    assert [line for line in engine.log if f"has {MAX_SESSIONS} others" in line]
    for raw_peer in kept:
        raw_peer.close()
    engine.works()


def test_what_an_engine_publishes_beyond_its_limits_is_refused_to_its_user(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owned, "MAX_CACHES", 2)
    manager, desc = engine.api.cache_manager, CacheDesc(2, [1, 64], DataType.DT_UINT8)
    kept = manager.allocate_cache(desc)
    with pytest.raises(LLMException, match="this engine has 2 caches, and with 1 more") as error:
        manager.allocate_cache(desc)
    assert error.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    manager.deallocate_cache(kept)
    manager.deallocate_cache(manager.allocate_cache(desc))


def test_a_peer_that_asks_for_a_link_has_us_wait_for_our_own_time(engine: Engine) -> None:
    raw_peer = engine.raw_peer()
    raw_peer.say(
        {"kind": "dial", "link": 1, "backend": "shm", "one_sided": False, "seconds": 2_000_000.0}
    )
    assert raw_peer.hear("form") is not None
    parts = engine.api._engine
    assert parts is not None
    (pair,) = parts._clusters.pairs.values()
    assert pair.deadline <= time.monotonic() + parts.options.link_total_time


def test_links_that_one_peer_begins_faster_than_they_are_closed_are_limited(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Item.ENDING, "limit", FEW)
    parts, go_on = engine.api._engine, threading.Event()
    assert parts is not None

    def wait() -> None:
        go_on.wait(60)

    for _ in range(4):  # nothing is closed meanwhile
        parts._workers.submit(wait)
    raw_peer = engine.raw_peer()
    try:
        for number in range(20):
            raw_peer.say({"kind": "dial", "link": number, "backend": "shm", "one_sided": False,
                          "seconds": 5.0})  # fmt: skip
        assert raw_peer.closed(20)
        assert engine.ended(f"it has {FEW + 1} links that are not closed yet, more than {FEW}")
        engine.works()
    finally:
        go_on.set()


def test_a_stranger_ends_no_link_that_it_is_no_member_of(engine: Engine) -> None:
    comm_id = engine.api.link("pair", PAIR, nodes.table_for(PAIR))
    raw_peer = engine.raw_peer(1, cluster=7)
    raw_peer.say({"kind": "mismatch", "link": comm_id, "reason": "made up"})
    raw_peer.say({"kind": "sync", "id": 7})
    assert raw_peer.hear("synced") is not None
    assert engine.api.link_error(comm_id) is None

"""When a domain is ready and linked, and members that fail while it is built."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from datadist_shm import ShmTransport
from datadist_shm.link import ShmLink

from datadist import (
    CacheDesc,
    DataType,
    LinkEventKind,
    LLMException,
    LLMStatusCode,
    RegisterMemStatus,
)
from datadist.transport import LinkError
from tests import nodes
from tests.forming import (
    GOOD,
    OTHER_TOKEN,
    PAIR,
    THREE,
    TOKEN,
    complete,
    form,
    hear_answer,
    rank_0,
    until_synced,
)
from tests.in_process_engine import Engine, Sent
from tests.raw_peer import RawPeer
from tests.waiting import until

REASON = {"reason": "for no reason"}


@pytest.fixture
def first(engine: Engine) -> RawPeer:
    """Rank 0 of the domain that the engine waits for."""
    return rank_0(engine)


# -- readiness -----------------------------------------------------------------------------------


def _kinds_for_a_while(raw_peer: RawPeer) -> set[str]:
    """What the engine says to a member while nothing more is said to it."""
    kinds: set[str] = set()
    for _ in range(20):
        kinds |= {message.kind for message in until_synced(raw_peer)}
        time.sleep(0.005)
    return kinds


def test_an_offer_that_was_taken_is_answered_although_another_one_fails(engine: Engine) -> None:
    first, other = engine.raw_peer(1, cluster=3), engine.raw_peer(2, cluster=2)
    comm_id = engine.api.link("three", THREE, nodes.table_for(THREE))
    for raw_peer in (first, other):
        assert raw_peer.hear("announce")
    Sent(first, GOOD, TOKEN)
    failing = Sent(other, {}, TOKEN)
    for raw_peer in (first, other):
        until_synced(raw_peer)
    assert first.say(form(engine, THREE, comm_id, first, other))
    for raw_peer in (first, other):
        assert hear_answer(raw_peer)
    assert failing.is_closed()
    assert "the offer of rank 2 is not valid" in str(_failed(engine, comm_id))


def test_a_transport_that_cannot_open_fails_the_link_and_no_session(
    engine: Engine, first: RawPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: Any) -> ShmLink:
        raise LinkError("no link today")

    monkeypatch.setattr(ShmTransport, "open", refuse)
    assert first.say(form(engine, PAIR, engine.comm_id, first))
    assert "opening the transport failed: no link today" in str(_failed(engine, engine.comm_id))
    monkeypatch.undo()
    engine.api.unlink(engine.comm_id)
    engine.comm_id = engine.api.link("again", PAIR, nodes.table_for(PAIR))
    assert first.say(form(engine, PAIR, engine.comm_id, first, token=OTHER_TOKEN))
    assert first.hear("offer") is not None


def _failed(engine: Engine, comm_id: int) -> str | None:
    until(lambda: engine.api.query_register_mem_status(comm_id) is RegisterMemStatus.FAILED)
    return engine.api.link_error(comm_id)


def test_we_are_ready_once_all_members_are_attached_and_linked_once_all_are_ready(
    engine: Engine,
) -> None:
    first, other = engine.raw_peer(1, cluster=3), engine.raw_peer(2, cluster=2)
    comm_id = engine.api.link("three", THREE, nodes.table_for(THREE))
    for raw_peer in (first, other):
        assert raw_peer.hear("announce")
    assert first.say(form(engine, THREE, comm_id, first, other))
    assert other.hear("offer") is not None
    Sent(first, GOOD, TOKEN)
    assert hear_answer(first)
    assert "ready" not in _kinds_for_a_while(first), "the other one is not attached"
    assert first.say({"kind": "ready", "domain": TOKEN})
    Sent(other, GOOD, TOKEN)
    for raw_peer in (first, other):
        assert raw_peer.hear("ready") is not None
    _kinds_for_a_while(other)
    assert engine.api.query_register_mem_status(comm_id) is RegisterMemStatus.PREPARING
    assert other.say({"kind": "ready", "domain": TOKEN})
    engine.api.wait_link(comm_id)


@pytest.mark.parametrize("few", [True, False])
def test_the_control_thread_opens_links_over_few_regions_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, few: bool
) -> None:
    reactor = engine.api._live(LLMStatusCode.LLM_FAILED)._reactor
    real, on_control_thread = ShmTransport.open, []

    def noted(*args: Any) -> ShmLink:
        on_control_thread.append(reactor.is_current_thread())
        return real(*args)

    monkeypatch.setattr(ShmTransport, "open", noted)
    if not few:
        monkeypatch.setattr("datadist.links.steps.FEW_REGIONS", 0)
    first = rank_0(engine)
    Sent(first, GOOD, TOKEN)
    complete(engine, first)
    assert on_control_thread == [few]


def test_members_join_once_however_their_offers_are_attached(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = engine.api._live(LLMStatusCode.LLM_FAILED).transport
    joins = replace(transport.capabilities, self_bootstrapping=True)
    monkeypatch.setattr(ShmTransport, "capabilities", joins)
    joined: list[float] = []
    monkeypatch.setattr(ShmLink, "join", lambda _link, timeout: joined.append(timeout))
    first = rank_0(engine)
    Sent(first, GOOD, TOKEN)
    complete(engine, first)
    _kinds_for_a_while(first)
    assert len(joined) == 1


@pytest.mark.parametrize("how", ["unlinked", "lost"])
def test_a_member_that_goes_before_all_are_ready_is_an_event_of_the_link(
    engine: Engine, how: str
) -> None:
    first, other = engine.raw_peer(1, cluster=3), engine.raw_peer(2, cluster=2)
    comm_id = engine.api.link("three", THREE, nodes.table_for(THREE))
    for raw_peer in (first, other):
        assert raw_peer.hear("announce")
    assert first.say(form(engine, THREE, comm_id, first, other))
    for raw_peer in (first, other):
        Sent(raw_peer, GOOD, TOKEN)
    assert first.hear("ready") is not None
    assert first.say({"kind": "ready", "domain": TOKEN})
    if how == "unlinked":
        assert first.say({"kind": "left", "domain": TOKEN, "seq": 1})
    else:
        first.close()
    deadline = time.monotonic() + nodes.SECONDS
    while engine.api.link_error(comm_id) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert engine.api.link_events() == []
    assert other.say({"kind": "ready", "domain": TOKEN})
    engine.api.wait_link(comm_id)
    kind = LinkEventKind.GONE if how == "unlinked" else LinkEventKind.BROKEN
    found = [(event.kind, event.cluster_ids) for event in engine.api.link_events()]
    assert found == [(LinkEventKind.OK, (2, 3)), (kind, (3,))]


# -- members that fail ---------------------------------------------------------------------------


def test_a_member_that_fails_takes_the_domain_along(engine: Engine, first: RawPeer) -> None:
    assert first.say(form(engine, PAIR, engine.comm_id, first))
    assert first.hear("offer") is not None
    assert first.say({"kind": "fail", "domain": TOKEN, **REASON})
    with pytest.raises(LLMException, match="cluster 2 reported: for no reason"):
        engine.api.wait_link(engine.comm_id)


def _refusal(engine: Engine, address: int) -> str | None:
    """Why a page cannot be registered."""
    desc = CacheDesc(1, [1, 4096], DataType.DT_UINT8)
    try:
        engine.api.cache_manager.register_cache(desc, [address])
    except LLMException as error:
        return str(error)
    return None


@pytest.mark.parametrize("ends", ["unlinked", "failed"])
def test_memory_that_a_link_exposed_can_be_registered_otherwise_after_it(
    engine: Engine, ends: str
) -> None:
    memory = np.zeros(8192, np.uint8)
    address = int(memory.ctypes.data)
    overlapping = address + 2048
    assert _refusal(engine, address) is None
    first = rank_0(engine)
    Sent(first, GOOD, TOKEN)
    if ends == "unlinked":
        complete(engine, first)
    else:
        assert first.say(form(engine, PAIR, engine.comm_id, first))
        assert hear_answer(first)
    engine.api.cache_manager.unregister_cache(engine.cache.cache_id + 1)
    assert "exposed by a live link" in str(_refusal(engine, overlapping))
    if ends == "failed":
        assert first.say({"kind": "fail", "domain": TOKEN, **REASON})
        with pytest.raises(LLMException, match="for no reason"):
            engine.api.wait_link(engine.comm_id)
    engine.api.unlink(engine.comm_id)
    deadline = time.monotonic() + nodes.SECONDS
    while (refusal := _refusal(engine, overlapping)) is not None:  # a link that failed ends later
        assert "exposed by a live link" in refusal
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_member_that_fails_when_we_are_ready_is_gone(engine: Engine, first: RawPeer) -> None:
    Sent(first, GOOD, TOKEN)
    complete(engine, first)
    assert first.say({"kind": "fail", "domain": TOKEN, **REASON})
    until_synced(first)
    assert engine.api.query_register_mem_status(engine.comm_id) is RegisterMemStatus.OK
    assert "cluster 2 gave up: for no reason" in str(engine.api.link_error(engine.comm_id))

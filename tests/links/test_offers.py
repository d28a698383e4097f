"""Offers that come early, twice or from others."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from datadist_shm import ShmTransport
from datadist_shm.link import ShmLink

from datadist import LLMStatusCode, RegisterMemStatus
from datadist.caches.peers import OFFER_WINDOW
from datadist.control.messages import Directory, Ready
from datadist.links import building
from tests import nodes
from tests.forming import (
    GOOD,
    OTHER_TOKEN,
    PAIR,
    TOKEN,
    answers,
    complete,
    form,
    hear_answer,
    rank_0,
    token_of_offer,
    until_synced,
)
from tests.in_process_engine import SECONDS, Engine, Sent
from tests.raw_peer import RawPeer

NONSENSE: dict[str, Any] = {}
"""An offer that fails a link where it is taken."""
REASON = {"reason": "for no reason"}


@pytest.fixture
def first(engine: Engine) -> RawPeer:
    """Rank 0 of the domain that the engine waits for."""
    return rank_0(engine)


# -- early offers --------------------------------------------------------------------------------


def test_an_offer_may_come_before_the_domain_is_known(engine: Engine, first: RawPeer) -> None:
    Sent(first, GOOD, TOKEN)
    assert answers(first) == 0
    complete(engine, first)
    assert hear_answer(first)


def test_who_is_ready_at_once_answers_the_offer_by_that(engine: Engine, first: RawPeer) -> None:
    assert first.say(form(engine, PAIR, engine.comm_id, first))
    Sent(first, GOOD, TOKEN)
    said = {message.kind: message for message in until_synced(first)}
    assert isinstance(ready := said["ready"], Ready)
    assert ready.attached
    assert isinstance(directory := said["directory"], Directory)
    assert directory.seq == 0, "it revokes nothing"
    assert "attached" not in said
    engine.api.cache_manager.deallocate_cache(engine.cache)
    assert isinstance(revoking := first.hear("directory"), Directory)
    assert revoking.seq == 1


def test_of_two_early_offers_the_first_one_counts(engine: Engine, first: RawPeer) -> None:
    Sent(first, GOOD, TOKEN)
    second = Sent(first, NONSENSE, TOKEN)
    assert answers(first) == 1
    assert second.is_closed()
    complete(engine, first)
    assert hear_answer(first)


def test_so_many_early_offers_are_kept_and_no_more(engine: Engine, first: RawPeer) -> None:
    tokens = [TOKEN, *(f"{number:032x}" for number in range(1, building.MAX_EARLY))]
    for token in tokens:
        Sent(first, GOOD, token)
    assert [m.kind for m in until_synced(first)] == ["synced"]
    over = Sent(first, GOOD, OTHER_TOKEN)
    assert answers(first, OTHER_TOKEN) == 1
    assert over.is_closed()
    complete(engine, first)


def test_an_early_offer_of_no_domain_is_forgotten(
    engine: Engine, first: RawPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "EARLY_SECONDS", 0.05)
    sent = Sent(first, GOOD, TOKEN)
    assert hear_answer(first)
    assert sent.is_closed()
    monkeypatch.undo()
    Sent(first, GOOD, TOKEN)  # its place is free
    assert answers(first) == 0


def test_early_offers_go_with_their_session(engine: Engine, first: RawPeer) -> None:
    sent = [Sent(first, GOOD, token) for token in (TOKEN, OTHER_TOKEN)]
    assert answers(first) == 0
    first.close()
    assert all(each.is_closed() for each in sent)


def test_an_offer_before_hello_is_closed_with_its_session(engine: Engine) -> None:
    sent = Sent(engine.raw_peer(hello=False), GOOD, TOKEN)
    assert engine.ended("it said offer before hello")
    assert sent.is_closed()


def test_an_early_offer_counts_for_its_own_domain_only(engine: Engine, first: RawPeer) -> None:
    Sent(first, NONSENSE, OTHER_TOKEN)
    Sent(first, GOOD, TOKEN)
    complete(engine, first)


# -- offers twice, and from others ---------------------------------------------------------------


def test_a_second_offer_before_the_link_is_open_changes_nothing(
    engine: Engine, first: RawPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on, real = threading.Event(), threading.Event(), ShmTransport.open

    def slowly(*args: Any) -> Any:
        entered.set()
        assert go_on.wait(SECONDS)
        return real(*args)

    transport = engine.api._live(LLMStatusCode.LLM_FAILED).transport
    by_worker = replace(transport.capabilities, opens_at_once=False)
    monkeypatch.setattr(ShmTransport, "capabilities", by_worker)
    monkeypatch.setattr(ShmTransport, "open", slowly)
    try:
        assert first.say(form(engine, PAIR, engine.comm_id, first))
        assert entered.wait(SECONDS)
        Sent(first, GOOD, TOKEN)
        second = Sent(first, NONSENSE, TOKEN)
        assert answers(first) == 1
        assert second.is_closed()
    finally:
        go_on.set()
    assert first.say({"kind": "ready", "domain": TOKEN})
    engine.api.wait_link(engine.comm_id)
    assert hear_answer(first)


@pytest.mark.parametrize("linked", [False, True])
def test_a_second_offer_after_the_first_was_attached_changes_nothing(
    engine: Engine, first: RawPeer, linked: bool
) -> None:
    assert first.say(form(engine, PAIR, engine.comm_id, first))
    Sent(first, GOOD, TOKEN)
    assert hear_answer(first)
    if linked:
        assert first.say({"kind": "ready", "domain": TOKEN})
        engine.api.wait_link(engine.comm_id)
    second = Sent(first, NONSENSE, TOKEN)
    assert hear_answer(first)
    assert second.is_closed()
    if not linked:
        assert first.say({"kind": "ready", "domain": TOKEN})
        engine.api.wait_link(engine.comm_id)
    assert engine.api.link_error(engine.comm_id) is None


def test_offers_and_readiness_of_others_are_no_members_word(engine: Engine, first: RawPeer) -> None:
    other = engine.raw_peer(5, cluster=5)
    assert first.say(form(engine, PAIR, engine.comm_id, first))
    assert first.hear("offer") is not None
    foreign = Sent(other, NONSENSE, TOKEN)
    assert answers(other) == 1
    assert foreign.is_closed()
    fields: dict[str, dict[str, Any]] = {
        "ready": {},
        "dissolve": REASON,
        "fail": REASON,
        "left": {"seq": 1},
    }
    for kind, more in fields.items():
        assert other.say({"kind": kind, "domain": TOKEN, **more})
    until_synced(other)
    Sent(first, GOOD, TOKEN)
    assert hear_answer(first)
    assert engine.api.query_register_mem_status(engine.comm_id) is RegisterMemStatus.PREPARING
    assert first.say({"kind": "ready", "domain": TOKEN})
    engine.api.wait_link(engine.comm_id)
    assert engine.api.link_error(engine.comm_id) is None


def test_what_is_no_offer_fails_its_link_and_no_session(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"pair{number}" for number in range(OFFER_WINDOW + 1)]
    comm_ids = [engine.api.link(name, PAIR, nodes.table_for(PAIR)) for name in names]
    first = engine.raw_peer()
    for number, comm_id in enumerate(comm_ids):
        assert first.say(form(engine, PAIR, comm_id, first, token=f"{number:032x}"))
    token = token_of_offer(first)
    until_synced(first)
    monkeypatch.setattr(ShmLink, "offer", lambda *_arguments: None)
    assert first.say({"kind": "attached", "domain": token})  # so that the last one is given
    until_synced(first)
    status = engine.api.query_register_mem_status
    assert status(comm_ids[-1]) is RegisterMemStatus.FAILED
    assert "making the offer for rank 0 failed" in str(engine.api.link_error(comm_ids[-1]))
    assert {status(comm_id) for comm_id in comm_ids[:-1]} == {RegisterMemStatus.PREPARING}


def test_a_member_that_answers_no_offer_gets_a_window_of_them(engine: Engine) -> None:
    names = [f"pair{number}" for number in range(OFFER_WINDOW + 2)]
    comm_ids = [engine.api.link(name, PAIR, nodes.table_for(PAIR)) for name in names]
    first = engine.raw_peer()
    for number, comm_id in enumerate(comm_ids):
        assert first.say(form(engine, PAIR, comm_id, first, token=f"{number:032x}"))
    given = {token_of_offer(first) for _ in range(OFFER_WINDOW)}
    for _ in range(20):  # the others have been prepared meanwhile
        assert "offer" not in [message.kind for message in until_synced(first)]
        time.sleep(0.01)
    for token, kind in zip(sorted(given), ("attached", "ready"), strict=False):
        more = {"attached": True} if kind == "ready" else {}
        assert first.say({"kind": kind, "domain": token, **more})
        given.add(token_of_offer(first))
    assert given == {f"{number:032x}" for number in range(OFFER_WINDOW + 2)}

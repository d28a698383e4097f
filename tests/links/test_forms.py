"""Who may name the members of a domain, and which members."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from datadist import RegisterMemStatus
from datadist.control.messages import Dial, Dissolve, Form
from datadist.control.runtime_dir import Address, RuntimeDir
from tests import nodes
from tests.forming import (
    GOOD,
    OTHER_TOKEN,
    PAIR,
    THREE,
    TOKEN,
    complete,
    form,
    rank_0,
    token_of_offer,
    until_synced,
)
from tests.in_process_engine import Engine, Sent
from tests.raw_peer import RawPeer


def test_only_rank_0_names_the_members(engine: Engine) -> None:
    first, other = engine.raw_peer(1, cluster=3), engine.raw_peer(2, cluster=2)
    comm_id = engine.api.link("three", THREE, nodes.table_for(THREE))
    for raw_peer in (first, other):
        assert raw_peer.hear("announce")
    assert other.say(form(engine, THREE, comm_id, first, other))
    refused = other.hear("dissolve")
    assert refused is not None
    assert (refused.domain, refused.reason) == (TOKEN, "a member is not waiting any more")  # type: ignore[union-attr]
    assert engine.api.query_register_mem_status(comm_id) is RegisterMemStatus.PREPARING
    assert first.say(form(engine, THREE, comm_id, first, other, token=OTHER_TOKEN))
    for raw_peer in (first, other):
        offer = raw_peer.hear("offer")
        assert offer is not None
        assert offer.domain == OTHER_TOKEN  # type: ignore[union-attr]


@pytest.mark.parametrize(("mapping", "names"), [(PAIR, False), ({1: 0, 2: 1}, True)])
def test_we_name_the_members_as_rank_0_only(
    engine: Engine, mapping: dict[int, int], names: bool
) -> None:
    raw_peer = engine.raw_peer()
    engine.api.link("pair", mapping, nodes.table_for(mapping))
    announced = raw_peer.hear("announce")
    assert announced is not None
    assert raw_peer.say({**announced.model_dump(), "link": 1})
    assert ("form" in [message.kind for message in until_synced(raw_peer)]) is names


def test_a_wish_that_has_been_met_makes_no_second_domain(engine: Engine) -> None:
    """The peer has to wish for each domain, although both wishes look the same."""
    mapping, peer = {1: 0, 2: 1}, engine.raw_peer()
    engine.api.link("pair", mapping, nodes.table_for(mapping))
    announced = peer.hear("announce")
    assert announced is not None
    assert peer.say({**announced.model_dump(), "link": 1})
    assert peer.hear("form") is not None
    engine.api.link("pair", mapping, nodes.table_for(mapping))
    assert "form" not in [message.kind for message in until_synced(peer)]
    assert peer.say({**announced.model_dump(), "link": 2})
    second = peer.hear("form")
    assert isinstance(second, Form)
    assert {member.link for member in second.members if member.cluster_id == 2} == {2}


def test_nobody_passes_for_rank_0_under_its_own_incarnation(engine: Engine) -> None:
    """An engine that said hello as another cluster is not rank 0, whatever its `Form` says."""
    other = engine.raw_peer(2, cluster=2)
    comm_id = engine.api.link("three", THREE, nodes.table_for(THREE))
    assert other.hear("announce")
    said = form(engine, {1: 1, 2: 2}, comm_id, other)
    said["members"].append(
        {"rank": 0, "cluster_id": 3, "incarnation": other.incarnation, "link": 1}
    )
    assert other.say(said)
    assert other.hear("dissolve") is not None
    assert "offer" not in [message.kind for message in until_synced(other)]


def test_nobody_names_another_engine_of_its_cluster_as_rank_0(engine: Engine) -> None:
    """Only the engine that is rank 0 names the members: its cluster id may be used twice."""
    first, twin = engine.raw_peer(1), engine.raw_peer(2)
    comm_id = engine.api.link("pair", PAIR, nodes.table_for(PAIR))
    for raw_peer in (first, twin):
        assert raw_peer.hear("announce")
    said = form(engine, PAIR, comm_id, first)
    assert twin.say(said)
    assert twin.hear("dissolve") is not None
    assert "offer" not in [message.kind for message in until_synced(first)]
    assert first.say(said)
    assert first.hear("offer") is not None


FORMS: dict[str, dict[str, Any]] = {
    "another link of ours": {"link": 9_999},
    "another cluster": {"cluster_id": 4},
    "another rank": {"rank": 2},
    "another engine": {"incarnation": "c" * 32},
}


@pytest.mark.parametrize("wrong", FORMS)
def test_a_form_that_does_not_fit_our_wish_is_refused(engine: Engine, wrong: str) -> None:
    first = engine.raw_peer()
    comm_id = engine.api.link("pair", PAIR, nodes.table_for(PAIR))
    assert first.hear("announce")
    said = form(engine, PAIR, comm_id, first)
    (ours,) = [member for member in said["members"] if member["cluster_id"] == 1]
    ours.update(FORMS[wrong])
    assert first.say(said)
    assert first.hear("dissolve") is not None
    assert first.say(form(engine, PAIR, comm_id, first, token=OTHER_TOKEN))
    assert first.hear("offer") is not None


def test_the_token_of_a_domain_names_no_second_one(engine: Engine) -> None:
    """Also not for a member that knows it: the first domain goes on."""
    first = rank_0(engine)
    Sent(first, GOOD, TOKEN)
    complete(engine, first)
    comm_id = engine.api.link("second", PAIR, nodes.table_for(PAIR))
    assert first.hear("announce")
    assert first.say(form(engine, PAIR, comm_id, first))
    refused = first.hear("dissolve")
    assert isinstance(refused, Dissolve)
    assert refused.reason == "another domain has that token"
    assert first.say(form(engine, PAIR, comm_id, first, token=OTHER_TOKEN))
    assert token_of_offer(first) == OTHER_TOKEN
    assert engine.api.query_register_mem_status(engine.comm_id) is RegisterMemStatus.OK


PORT = 26_999
"""Nobody listens there: the runtime directory says who does."""


@pytest.fixture
def asked(engine: Engine) -> Iterator[tuple[RawPeer, int]]:
    """An engine of cluster 2 whom ours asks for a link, and the id of that link."""
    peer = engine.raw_peer(1)
    assert peer.hear("hello")
    refused = {"kind": "refused", "status": 1, "reason": "the test is over"}
    calls: list[Any] = []

    def ask() -> None:
        calls.append(engine.api.link_clusters([nodes.cluster_info(2, PORT)], 60_000))

    with ExitStack() as stack:
        directory = RuntimeDir(engine.runtime_dir, "")
        stack.callback(directory.close)
        directory.publish("127.0.0.1", PORT, Address(2, peer.incarnation))
        thread = threading.Thread(target=ask)
        thread.start()
        stack.callback(thread.join)
        dial = peer.hear("dial")
        assert isinstance(dial, Dial)
        stack.callback(peer.say, {**refused, "link": dial.link})
        yield peer, dial.link


PAIRS: dict[str, dict[str, Any]] = {
    **{wrong: {"ours": changes} for wrong, changes in FORMS.items()},
    "a peer of another cluster": {"theirs": {"cluster_id": 4}},
    "a peer that is another engine": {"theirs": {"incarnation": "c" * 32}},
}


@pytest.mark.parametrize("wrong", PAIRS)
def test_a_form_that_does_not_fit_what_link_clusters_asks_is_refused(
    engine: Engine, asked: tuple[RawPeer, int], wrong: str
) -> None:
    peer, link = asked
    said = form(engine, {1: 0, 2: 1}, link, peer)
    ours, theirs = said["members"]
    ours.update(PAIRS[wrong].get("ours", {}))
    theirs.update(PAIRS[wrong].get("theirs", {}))
    assert peer.say(said)
    assert peer.hear("dissolve") is not None
    assert peer.say(form(engine, {1: 0, 2: 1}, link, peer, token=OTHER_TOKEN))
    assert token_of_offer(peer) == OTHER_TOKEN


def test_the_token_of_a_domain_names_no_link_of_link_clusters(
    engine: Engine, asked: tuple[RawPeer, int]
) -> None:
    peer, link = asked
    first = rank_0(engine, 3)
    Sent(first, GOOD, TOKEN)
    complete(engine, first)
    assert peer.say(form(engine, {1: 0, 2: 1}, link, peer))
    assert peer.hear("dissolve") is not None
    assert peer.say(form(engine, {1: 0, 2: 1}, link, peer, token=OTHER_TOKEN))
    assert token_of_offer(peer) == OTHER_TOKEN
    assert engine.api.query_register_mem_status(engine.comm_id) is RegisterMemStatus.OK


def test_only_the_one_that_was_asked_answers_link_clusters(
    engine: Engine, asked: tuple[RawPeer, int]
) -> None:
    peer, link = asked
    other = engine.raw_peer(2)
    assert other.hear("hello")
    for said in (
        form(engine, {1: 0, 2: 1}, link, peer),
        form(engine, {1: 0, 2: 1}, link, other),
    ):
        assert other.say(said)
        assert other.hear("dissolve") is not None
    assert peer.say(form(engine, {1: 0, 2: 1}, link, peer, token=OTHER_TOKEN))
    assert token_of_offer(peer) == OTHER_TOKEN

"""Building a domain: who may name its members, and offers that come early, twice or from others."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from datadist_shm import ShmTransport

from datadist import LLMException, RegisterMemStatus
from datadist.caches.peers import OFFER_WINDOW
from datadist.control.messages import Dial, Message, OfferMessage
from datadist.control.runtime_dir import Address, RuntimeDir
from datadist.links import building
from tests import nodes
from tests.hosted import SECONDS, SIZE, Engine, Sent
from tests.stranger import Stranger

PAIR = {2: 0, 1: 1}
"""The stranger of cluster 2 is rank 0, which names the members when it likes."""
THREE = {3: 0, 1: 1, 2: 2}
TOKEN, OTHER_TOKEN = "a" * 32, "b" * 32
GOOD = {
    "version": 1, "writable": False, "fence": None,
    "regions": [{"id": 1, "address": 1 << 40, "size": SIZE, "fd": 0}],
}  # fmt: skip
NONSENSE: dict[str, Any] = {}
"""An offer that fails a link where it is taken."""


REASON = {"reason": "for no reason"}


def _own_incarnation(engine: Engine) -> str:
    (path,) = engine.runtime_dir.glob("1-*.sock")
    return path.stem.partition("-")[2]


def _form(
    engine: Engine, mapping: dict[int, int], comm_id: int, *members: Stranger, token: str = TOKEN
) -> dict[str, Any]:
    """The members of a domain, as rank 0 names them."""
    incarnations = {1: _own_incarnation(engine), **{m.cluster: m.incarnation for m in members}}
    return {
        "kind": "form",
        "domain": token,
        "members": [
            {
                "rank": rank, "cluster_id": cluster, "incarnation": incarnations[cluster],
                "link": comm_id if cluster == 1 else 1,
            }
            for cluster, rank in mapping.items()
        ],
    }  # fmt: skip


def _until_synced(stranger: Stranger) -> list[Message]:
    """What the engine said, until all that the stranger said before was handled."""
    stranger.say({"kind": "sync", "id": 7})
    said: list[Message] = []
    while not said or said[-1].kind != "synced":
        message = stranger.hear_any()
        assert message is not None, "the engine ended the session"
        said.append(message)
    return said


def _answers(stranger: Stranger, token: str = TOKEN) -> int:
    """How many offers were answered since the last question."""
    said = _until_synced(stranger)
    return len([m for m in said if m.kind == "attached" and m.domain == token])


# -- who names the members -----------------------------------------------------------------------


def test_only_rank_0_names_the_members(engine: Engine) -> None:
    first, other = engine.stranger(1, cluster=3), engine.stranger(2, cluster=2)
    comm_id = engine.api.link("three", THREE, nodes.table_for(THREE))
    for stranger in (first, other):
        assert stranger.hear("announce")
    assert other.say(_form(engine, THREE, comm_id, first, other))
    refused = other.hear("dissolve")
    assert refused is not None
    assert (refused.domain, refused.reason) == (TOKEN, "a member is not waiting any more")  # type: ignore[union-attr]
    assert engine.api.query_register_mem_status(comm_id) is RegisterMemStatus.PREPARING
    assert first.say(_form(engine, THREE, comm_id, first, other, token=OTHER_TOKEN))
    for stranger in (first, other):
        offer = stranger.hear("offer")
        assert offer is not None
        assert offer.domain == OTHER_TOKEN  # type: ignore[union-attr]


@pytest.mark.parametrize(("mapping", "names"), [(PAIR, False), ({1: 0, 2: 1}, True)])
def test_we_name_the_members_as_rank_0_only(
    engine: Engine, mapping: dict[int, int], names: bool
) -> None:
    stranger = engine.stranger()
    engine.api.link("pair", mapping, nodes.table_for(mapping))
    announced = stranger.hear("announce")
    assert announced is not None
    assert stranger.say({**announced.model_dump(), "link": 1})
    assert ("form" in [message.kind for message in _until_synced(stranger)]) is names


def test_nobody_passes_for_rank_0_under_its_own_incarnation(engine: Engine) -> None:
    """An engine that said hello as another cluster is not rank 0, whatever its `Form` says."""
    other = engine.stranger(2, cluster=2)
    comm_id = engine.api.link("three", THREE, nodes.table_for(THREE))
    assert other.hear("announce")
    form = _form(engine, {1: 1, 2: 2}, comm_id, other)
    form["members"].append(
        {"rank": 0, "cluster_id": 3, "incarnation": other.incarnation, "link": 1}
    )
    assert other.say(form)
    assert other.hear("dissolve") is not None
    assert "offer" not in [message.kind for message in _until_synced(other)]


def test_nobody_names_another_engine_of_its_cluster_as_rank_0(engine: Engine) -> None:
    """Only the engine that is rank 0 names the members: its cluster id may be used twice."""
    first, twin = engine.stranger(1), engine.stranger(2)
    comm_id = engine.api.link("pair", PAIR, nodes.table_for(PAIR))
    for stranger in (first, twin):
        assert stranger.hear("announce")
    form = _form(engine, PAIR, comm_id, first)
    assert twin.say(form)
    assert twin.hear("dissolve") is not None
    assert "offer" not in [message.kind for message in _until_synced(first)]
    assert first.say(form)
    assert first.hear("offer") is not None


FORMS: dict[str, dict[str, Any]] = {
    "another link of ours": {"link": 9_999},
    "another cluster": {"cluster_id": 4},
    "another rank": {"rank": 2},
    "another engine": {"incarnation": "c" * 32},
}


@pytest.mark.parametrize("wrong", FORMS)
def test_a_form_that_does_not_fit_our_wish_is_refused(engine: Engine, wrong: str) -> None:
    first = engine.stranger()
    comm_id = engine.api.link("pair", PAIR, nodes.table_for(PAIR))
    assert first.hear("announce")
    form = _form(engine, PAIR, comm_id, first)
    (ours,) = [member for member in form["members"] if member["cluster_id"] == 1]
    ours.update(FORMS[wrong])
    assert first.say(form)
    assert first.hear("dissolve") is not None
    assert first.say(_form(engine, PAIR, comm_id, first, token=OTHER_TOKEN))
    assert first.hear("offer") is not None


PORT = 26_999
"""Nobody listens there: the runtime directory says who does."""


@pytest.fixture
def asked(engine: Engine) -> Iterator[tuple[Stranger, int]]:
    """An engine of cluster 2 whom ours asks for a link, and the id of that link."""
    peer = engine.stranger(1)
    assert peer.hear("hello")
    directory = RuntimeDir(engine.runtime_dir, "")
    directory.publish("127.0.0.1", PORT, Address(2, peer.incarnation))
    calls: list[Any] = []

    def ask() -> None:
        calls.append(engine.api.link_clusters([nodes.cluster_info(2, PORT)], 60_000))

    thread = threading.Thread(target=ask)
    thread.start()
    dial = peer.hear("dial")
    assert isinstance(dial, Dial)
    yield peer, dial.link
    peer.say({"kind": "refused", "link": dial.link, "status": 1, "reason": "the test is over"})
    thread.join()
    directory.close()


PAIRS: dict[str, dict[str, Any]] = {
    **{wrong: {"ours": changes} for wrong, changes in FORMS.items()},
    "a peer of another cluster": {"theirs": {"cluster_id": 4}},
    "a peer that is another engine": {"theirs": {"incarnation": "c" * 32}},
}


@pytest.mark.parametrize("wrong", PAIRS)
def test_a_form_that_does_not_fit_what_link_clusters_asks_is_refused(
    engine: Engine, asked: tuple[Stranger, int], wrong: str
) -> None:
    peer, link = asked
    form = _form(engine, {1: 0, 2: 1}, link, peer)
    ours, theirs = form["members"]
    ours.update(PAIRS[wrong].get("ours", {}))
    theirs.update(PAIRS[wrong].get("theirs", {}))
    assert peer.say(form)
    assert peer.hear("dissolve") is not None
    assert peer.say(_form(engine, {1: 0, 2: 1}, link, peer, token=OTHER_TOKEN))
    assert _token_of_offer(peer) == OTHER_TOKEN


def test_only_the_one_that_was_asked_answers_link_clusters(
    engine: Engine, asked: tuple[Stranger, int]
) -> None:
    peer, link = asked
    other = engine.stranger(2)
    assert other.hear("hello")
    for form in (
        _form(engine, {1: 0, 2: 1}, link, peer),
        _form(engine, {1: 0, 2: 1}, link, other),
    ):
        assert other.say(form)
        assert other.hear("dissolve") is not None
    assert peer.say(_form(engine, {1: 0, 2: 1}, link, peer, token=OTHER_TOKEN))
    assert _token_of_offer(peer) == OTHER_TOKEN


# -- early offers --------------------------------------------------------------------------------


@pytest.fixture
def first(engine: Engine) -> Stranger:
    """Rank 0 of the domain that the engine waits for."""
    engine.comm_id = engine.api.link("pair", PAIR, nodes.table_for(PAIR))
    made = engine.stranger()
    assert made.hear("announce")
    return made


def _complete(engine: Engine, first: Stranger) -> None:
    """Name the members, and be ready: the link is OK once the offer that was sent is attached."""
    assert first.say(_form(engine, PAIR, engine.comm_id, first))
    assert first.say({"kind": "ready", "domain": TOKEN})
    engine.api.wait_link(engine.comm_id)


def test_an_offer_may_come_before_the_domain_is_known(engine: Engine, first: Stranger) -> None:
    sent = Sent(first, GOOD, TOKEN)
    assert _answers(first) == 0
    _complete(engine, first)
    assert first.hear("attached") is not None
    assert sent.is_closed(), "the mapping needs no descriptor"


def test_of_two_early_offers_the_first_one_counts(engine: Engine, first: Stranger) -> None:
    Sent(first, GOOD, TOKEN)
    second = Sent(first, NONSENSE, TOKEN)
    assert _answers(first) == 1
    assert second.is_closed()
    _complete(engine, first)
    assert first.hear("attached") is not None


def test_so_many_early_offers_are_kept_and_no_more(engine: Engine, first: Stranger) -> None:
    tokens = [TOKEN, *(f"{number:032x}" for number in range(1, building.MAX_EARLY))]
    for token in tokens:
        Sent(first, GOOD, token)
    assert [m.kind for m in _until_synced(first)] == ["synced"]
    over = Sent(first, GOOD, OTHER_TOKEN)
    assert _answers(first, OTHER_TOKEN) == 1
    assert over.is_closed()
    _complete(engine, first)


def test_an_early_offer_of_no_domain_is_forgotten(
    engine: Engine, first: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "EARLY_SECONDS", 0.05)
    sent = Sent(first, GOOD, TOKEN)
    assert first.hear("attached") is not None
    assert sent.is_closed()
    monkeypatch.undo()
    Sent(first, GOOD, TOKEN)  # its place is free
    assert _answers(first) == 0


def test_early_offers_go_with_their_session(engine: Engine, first: Stranger) -> None:
    sent = [Sent(first, GOOD, token) for token in (TOKEN, OTHER_TOKEN)]
    assert _answers(first) == 0
    first.close()
    assert all(each.is_closed() for each in sent)


def test_an_offer_before_hello_is_closed_with_its_session(engine: Engine) -> None:
    sent = Sent(engine.stranger(hello=False), GOOD, TOKEN)
    assert engine.ended("it said offer before hello")
    assert sent.is_closed()


def test_an_early_offer_counts_for_its_own_domain_only(engine: Engine, first: Stranger) -> None:
    Sent(first, NONSENSE, OTHER_TOKEN)
    Sent(first, GOOD, TOKEN)
    _complete(engine, first)


# -- offers twice, and from others ---------------------------------------------------------------


def test_a_second_offer_before_the_link_is_open_changes_nothing(
    engine: Engine, first: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on, real = threading.Event(), threading.Event(), ShmTransport.open

    def slowly(*args: Any) -> Any:
        entered.set()
        assert go_on.wait(SECONDS)
        return real(*args)

    monkeypatch.setattr(ShmTransport, "open", slowly)
    try:
        assert first.say(_form(engine, PAIR, engine.comm_id, first))
        assert entered.wait(SECONDS)
        Sent(first, GOOD, TOKEN)
        second = Sent(first, NONSENSE, TOKEN)
        assert _answers(first) == 1
        assert second.is_closed()
    finally:
        go_on.set()
    assert first.say({"kind": "ready", "domain": TOKEN})
    engine.api.wait_link(engine.comm_id)
    assert first.hear("attached") is not None


@pytest.mark.parametrize("linked", [False, True])
def test_a_second_offer_after_the_first_was_attached_changes_nothing(
    engine: Engine, first: Stranger, linked: bool
) -> None:
    assert first.say(_form(engine, PAIR, engine.comm_id, first))
    Sent(first, GOOD, TOKEN)
    assert first.hear("attached") is not None
    if linked:
        assert first.say({"kind": "ready", "domain": TOKEN})
        engine.api.wait_link(engine.comm_id)
    second = Sent(first, NONSENSE, TOKEN)
    assert first.hear("attached") is not None
    assert second.is_closed()
    if not linked:
        assert first.say({"kind": "ready", "domain": TOKEN})
        engine.api.wait_link(engine.comm_id)
    assert engine.api.link_error(engine.comm_id) is None


def test_offers_and_readiness_of_others_are_no_members_word(
    engine: Engine, first: Stranger
) -> None:
    other = engine.stranger(5, cluster=5)
    assert first.say(_form(engine, PAIR, engine.comm_id, first))
    assert first.hear("offer") is not None
    foreign = Sent(other, NONSENSE, TOKEN)
    assert _answers(other) == 1
    assert foreign.is_closed()
    fields: dict[str, dict[str, Any]] = {
        "ready": {},
        "dissolve": REASON,
        "fail": REASON,
        "left": {"seq": 1},
    }
    for kind, more in fields.items():
        assert other.say({"kind": kind, "domain": TOKEN, **more})
    _until_synced(other)
    Sent(first, GOOD, TOKEN)
    assert first.hear("attached") is not None
    assert engine.api.query_register_mem_status(engine.comm_id) is RegisterMemStatus.PREPARING
    assert first.say({"kind": "ready", "domain": TOKEN})
    engine.api.wait_link(engine.comm_id)
    assert engine.api.link_error(engine.comm_id) is None


def test_a_member_that_answers_no_offer_gets_a_window_of_them(engine: Engine) -> None:
    names = [f"pair{number}" for number in range(OFFER_WINDOW + 2)]
    comm_ids = [engine.api.link(name, PAIR, nodes.table_for(PAIR)) for name in names]
    first = engine.stranger()
    for number, comm_id in enumerate(comm_ids):
        assert first.say(_form(engine, PAIR, comm_id, first, token=f"{number:032x}"))
    given = {_token_of_offer(first) for _ in range(OFFER_WINDOW)}
    for _ in range(20):  # the others have been prepared meanwhile
        assert "offer" not in [message.kind for message in _until_synced(first)]
        time.sleep(0.01)
    for token in sorted(given)[:2]:
        assert first.say({"kind": "attached", "domain": token})
        given.add(_token_of_offer(first))
    assert given == {f"{number:032x}" for number in range(OFFER_WINDOW + 2)}


def _token_of_offer(stranger: Stranger) -> str:
    offer = stranger.hear("offer")
    assert isinstance(offer, OfferMessage)
    return offer.domain


# -- readiness -----------------------------------------------------------------------------------


def _kinds_for_a_while(stranger: Stranger) -> set[str]:
    """What the engine says to a member while nothing more is said to it."""
    kinds: set[str] = set()
    for _ in range(20):
        kinds |= {message.kind for message in _until_synced(stranger)}
        time.sleep(0.005)
    return kinds


def test_we_are_ready_once_all_members_are_attached_and_linked_once_all_are_ready(
    engine: Engine,
) -> None:
    first, other = engine.stranger(1, cluster=3), engine.stranger(2, cluster=2)
    comm_id = engine.api.link("three", THREE, nodes.table_for(THREE))
    for stranger in (first, other):
        assert stranger.hear("announce")
    assert first.say(_form(engine, THREE, comm_id, first, other))
    assert other.hear("offer") is not None
    Sent(first, GOOD, TOKEN)
    assert first.hear("attached") is not None
    assert "ready" not in _kinds_for_a_while(first), "the other one is not attached"
    assert first.say({"kind": "ready", "domain": TOKEN})
    Sent(other, GOOD, TOKEN)
    for stranger in (first, other):
        assert stranger.hear("ready") is not None
    _kinds_for_a_while(other)
    assert engine.api.query_register_mem_status(comm_id) is RegisterMemStatus.PREPARING
    assert other.say({"kind": "ready", "domain": TOKEN})
    engine.api.wait_link(comm_id)


# -- members that fail ---------------------------------------------------------------------------


def test_a_member_that_fails_takes_the_domain_along(engine: Engine, first: Stranger) -> None:
    assert first.say(_form(engine, PAIR, engine.comm_id, first))
    assert first.hear("offer") is not None
    assert first.say({"kind": "fail", "domain": TOKEN, **REASON})
    with pytest.raises(LLMException, match="cluster 2 reported: for no reason"):
        engine.api.wait_link(engine.comm_id)


def test_a_member_that_fails_when_we_are_ready_is_gone(engine: Engine, first: Stranger) -> None:
    Sent(first, GOOD, TOKEN)
    _complete(engine, first)
    assert first.say({"kind": "fail", "domain": TOKEN, **REASON})
    _until_synced(first)
    assert engine.api.query_register_mem_status(engine.comm_id) is RegisterMemStatus.OK
    assert "cluster 2 gave up: for no reason" in str(engine.api.link_error(engine.comm_id))

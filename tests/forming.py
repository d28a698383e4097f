"""What a raw peer says to an engine that forms a domain with it."""

from __future__ import annotations

from typing import Any

from datadist.control.messages import Attached, Message, OfferMessage, Ready
from datadist.control.runtime_dir import engine_of
from tests import nodes
from tests.in_process_engine import Engine, offer_of
from tests.raw_peer import RawPeer, socket_of

PAIR = {2: 0, 1: 1}
"""The raw peer of cluster 2 is rank 0, which names the members when it likes."""
THREE = {3: 0, 1: 1, 2: 2}
TOKEN, OTHER_TOKEN = "a" * 32, "b" * 32
GOOD = offer_of()


def _own_incarnation(engine: Engine) -> str:
    address = engine_of(socket_of(engine.runtime_dir, 1).name)
    assert address is not None
    return address.incarnation


def form(
    engine: Engine, mapping: dict[int, int], comm_id: int, *members: RawPeer, token: str = TOKEN
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


def until_synced(raw_peer: RawPeer) -> list[Message]:
    """What the engine said, until all that the raw peer said before was handled."""
    raw_peer.say({"kind": "sync", "id": 7})
    said: list[Message] = []
    while not said or said[-1].kind != "synced":
        message = raw_peer.hear_any()
        assert message is not None, "the engine ended the session"
        said.append(message)
    return said


def answers(raw_peer: RawPeer, token: str = TOKEN) -> int:
    """How many offers were answered since the last question."""
    said = until_synced(raw_peer)
    return len([message for message in said if is_answer(message, token)])


def is_answer(message: Message, token: str = TOKEN) -> bool:
    """Whether it says that an offer was taken: alone, or with the news that the engine is ready."""
    alone = isinstance(message, Attached) and message.domain == token
    return alone or (isinstance(message, Ready) and message.domain == token and message.attached)


def hear_answer(raw_peer: RawPeer) -> bool:
    """Whether the next offer is answered before the connection ends."""
    while (message := raw_peer.hear_any()) is not None:
        if is_answer(message):
            return True
    return False


def complete(engine: Engine, first: RawPeer) -> None:
    """Name the members, and be ready: the link is OK once the offer that was sent is attached."""
    assert first.say(form(engine, _pair(first.cluster), engine.comm_id, first))
    assert first.say({"kind": "ready", "domain": TOKEN})
    engine.api.wait_link(engine.comm_id)


def token_of_offer(raw_peer: RawPeer) -> str:
    """The domain that the engine offers its memory to next."""
    offer = raw_peer.hear("offer")
    assert isinstance(offer, OfferMessage)
    return offer.domain


def _pair(cluster: int) -> dict[int, int]:
    return {cluster: 0, 1: 1}


def rank_0(engine: Engine, cluster: int = 2) -> RawPeer:
    """A raw peer that is rank 0 of the domain that the engine begins to wait for."""
    pair = _pair(cluster)
    engine.comm_id = engine.api.link("pair", pair, nodes.table_for(pair))
    made = engine.raw_peer(0 if cluster == 2 else cluster, cluster=cluster)
    assert made.hear("announce")
    return made

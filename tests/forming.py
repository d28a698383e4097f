"""What a stranger says to an engine that forms a domain with it."""

from __future__ import annotations

from typing import Any

from datadist.control.messages import Message, OfferMessage
from tests import nodes
from tests.hosted import Engine, offer_of
from tests.stranger import Stranger

PAIR = {2: 0, 1: 1}
"""The stranger of cluster 2 is rank 0, which names the members when it likes."""
THREE = {3: 0, 1: 1, 2: 2}
TOKEN, OTHER_TOKEN = "a" * 32, "b" * 32
GOOD = offer_of()


def _own_incarnation(engine: Engine) -> str:
    (path,) = engine.runtime_dir.glob("1-*.sock")
    return path.stem.partition("-")[2]


def form(
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


def until_synced(stranger: Stranger) -> list[Message]:
    """What the engine said, until all that the stranger said before was handled."""
    stranger.say({"kind": "sync", "id": 7})
    said: list[Message] = []
    while not said or said[-1].kind != "synced":
        message = stranger.hear_any()
        assert message is not None, "the engine ended the session"
        said.append(message)
    return said


def answers(stranger: Stranger, token: str = TOKEN) -> int:
    """How many offers were answered since the last question."""
    said = until_synced(stranger)
    return len([m for m in said if m.kind == "attached" and m.domain == token])


def complete(engine: Engine, first: Stranger) -> None:
    """Name the members, and be ready: the link is OK once the offer that was sent is attached."""
    assert first.say(form(engine, PAIR, engine.comm_id, first))
    assert first.say({"kind": "ready", "domain": TOKEN})
    engine.api.wait_link(engine.comm_id)


def token_of_offer(stranger: Stranger) -> str:
    """The domain that the engine offers its memory to next."""
    offer = stranger.hear("offer")
    assert isinstance(offer, OfferMessage)
    return offer.domain


def rank_0(engine: Engine) -> Stranger:
    """A stranger that is rank 0 of the domain that the engine begins to wait for."""
    engine.comm_id = engine.api.link("pair", PAIR, nodes.table_for(PAIR))
    made = engine.stranger()
    assert made.hear("announce")
    return made

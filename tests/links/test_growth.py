"""What links make of a peer's messages costs as much as these are long, however many came before."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from datadist.caches.peers import Announcements
from datadist.control.account import Account, Item
from datadist.control.messages import Announce
from datadist.links.matching import differences, mutual
from tests.growth import MOST, growth

MAPPING = [(1, 0), (2, 1)]


def _wish(link: int, name: str = "x", table: str = "{}") -> Announce:
    return Announce(
        link=link, name=name, ranks=MAPPING, table=table, backend="shm", one_sided=False
    )


def _table(count: int, port: int) -> str:
    devices = [
        {"device_id": str(n), "rank_id": str(n), "device_ip": f"10.0.{n // 250}.{n % 250 + 1}",
         "device_port": str(port)}
        for n in range(count)
    ]  # fmt: skip
    server = {"server_id": "10.0.0.1", "device": devices}
    return json.dumps(
        {"version": "1.2", "status": "completed", "server_count": "1", "server_list": [server]}
    )


@pytest.mark.parametrize("names", ["one name", "many names"])
@pytest.mark.parametrize("order", [1, -1])
def test_wishes_cost_the_same_however_many_there_are(
    names: str, order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Item.WISHES, "limit", 1 << 20)

    def prepare(count: int) -> Callable[[], object]:
        wishes = Announcements(Account())
        made = [_wish(n, "x" if names == "one name" else f"x{n}") for n in range(count)]

        def work() -> None:
            for wish in made:
                wishes.put(wish)
            for wish in made[::order]:
                wishes.withdraw(wish.link)

        return work

    assert growth(prepare, 1000) < MOST


def test_rank_tables_that_differ_are_compared_in_their_length() -> None:
    def prepare(count: int) -> Callable[[], object]:
        mine, theirs = _wish(1, table=_table(count, 1)), _wish(1, table=_table(count, 2))
        assert mutual(mine, 1, theirs, 2)
        return lambda: differences(mine, 1, theirs, 2)

    assert growth(prepare, 200) < MOST

"""What is kept of one peer: its wishes, and the offers that are on their way to it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from datadist.caches.peers import OFFER_WINDOW, Announcements, PeerView, domain_key
from datadist.control.messages import Ack, Announce, Binding, Directory, Entry
from tests.interrupts import raising


class Given:
    """A view without a session, and the offers that it gave, in order."""

    def __init__(self) -> None:
        nobody: Any = None
        self.view = PeerView(nobody)
        self.given: list[int] = []

    def queue(self, *numbers: int, sends: bool = True) -> None:
        for number in numbers:
            self.view.queue_offer(lambda number=number: self._give(number, sends))  # type: ignore[misc]

    def _give(self, number: int, sends: bool) -> bool:
        self.given.append(number)
        return sends


@pytest.fixture
def offers() -> Given:
    return Given()


def test_a_window_of_offers_is_out_and_the_rest_waits_in_order(offers: Given) -> None:
    offers.queue(*range(OFFER_WINDOW + 3))
    assert offers.given == list(range(OFFER_WINDOW))
    for taken in range(1, 4):
        offers.view.offer_taken()
        assert offers.given == list(range(OFFER_WINDOW + taken))
    offers.view.offer_taken()
    assert offers.given == list(range(OFFER_WINDOW + 3))


def test_offers_that_were_not_sent_take_no_place(offers: Given) -> None:
    offers.queue(*range(OFFER_WINDOW - 1))
    offers.queue(100, 101, 102, sends=False)
    offers.queue(200, 201)
    assert offers.given[OFFER_WINDOW - 1 :] == [100, 101, 102, 200]
    offers.view.offer_taken()
    assert offers.given[-1] == 201


def test_answers_to_nothing_widen_no_window(offers: Given) -> None:
    for _ in range(5):
        offers.view.offer_taken()
    offers.queue(*range(OFFER_WINDOW + 1))
    assert offers.given == list(range(OFFER_WINDOW))


def _announcement(link: int, name: str) -> Announce:
    return Announce(
        link=link, name=name, ranks=[(1, 0), (2, 1)], table="{}", backend="shm", one_sided=False
    )


def test_a_wish_is_replaced_by_a_later_one_of_the_same_link() -> None:
    announcements = Announcements()
    for announcement in (_announcement(1, "a"), _announcement(2, "a"), _announcement(1, "b")):
        announcements.put(announcement)
    assert len(announcements) == 2
    assert list(announcements.with_key(domain_key(_announcement(0, "a")))) == [2]
    assert list(announcements.with_key(domain_key(_announcement(0, "b")))) == [1]
    announcements.pop(1)
    announcements.pop(1)
    assert [each.message.link for each in announcements] == [2]
    assert not announcements.with_key(domain_key(_announcement(0, "b")))


# -- its directory -------------------------------------------------------------------------------


def _entry(cache_id: int) -> Entry:
    return Entry(
        cache_id=cache_id, blocks=True, bases=[1 << 20], stride=64, count=4, tensor_size=256,
        data_type=0, placement=1, pooled=True, accessible=True, regions=[1],
        bindings=[Binding(id=cache_id, slot=0, space="blocks", key=0, model=cache_id)],
    )  # fmt: skip


def test_a_directory_that_revokes_nothing_is_not_acknowledged() -> None:
    said: list[Ack] = []
    session: Any = SimpleNamespace(send_soon=said.append)
    view = PeerView(session)
    view.apply(Directory(seq=0, reset=True, upsert=[_entry(1)]))
    assert sorted(view.directory.entries) == [1]
    assert said == []
    view.apply(Directory(seq=1, remove=[1]))
    assert said == [Ack(seq=1)]


def test_a_directory_that_begins_anew_replaces_the_earlier_one() -> None:
    session: Any = SimpleNamespace(send_soon=lambda _message: None)
    view = PeerView(session)
    view.apply(Directory(seq=1, reset=True, last=False, upsert=[_entry(1)]))
    view.apply(Directory(seq=2, upsert=[_entry(2)]))
    assert sorted(view.directory.entries) == [1, 2], "the second part adds to the first"
    view.apply(Directory(seq=3, reset=True, upsert=[_entry(3)]))
    assert sorted(view.directory.entries) == [3]
    assert view.directory.binding_ids() == {3}
    assert view.version == 3


def test_a_question_that_is_interrupted_is_forgotten() -> None:
    view = PeerView(cast("Any", SimpleNamespace(closed=False, send=lambda _message: None)))
    for where in raising(lambda: view.synchronize(0.0)):
        assert not view._syncs, where

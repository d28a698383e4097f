"""Calls that wait for acknowledgements of peers (revocations.py)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from datadist.caches.peers import PeerView
from datadist.caches.revocations import Revocations


def _view(sent: int, acked: int = 0) -> PeerView:
    view = PeerView(cast("Any", SimpleNamespace(closed=False)))
    view.seq_sent, view.seq_acked = sent, acked
    return view


class _Calls:
    def __init__(self) -> None:
        self.revocations = Revocations()
        self.made: list[str] = []

    def wait(self, name: str, targets: dict[PeerView, int]) -> None:
        self.revocations.when_acked(targets, lambda: self.made.append(name))


@pytest.mark.parametrize("future", [4, 5, 1000, (1 << 64) - 1])
def test_what_was_not_sent_yet_is_not_acknowledged(future: int) -> None:
    calls, view = _Calls(), _view(sent=3)
    calls.revocations.on_ack(view, future)
    assert view.seq_acked == 3
    view.seq_sent = 5
    calls.wait("fourth", {view: 4})
    calls.wait("fifth", {view: 5})
    assert calls.made == []
    calls.revocations.on_ack(view, 4)
    assert calls.made == ["fourth"]
    calls.revocations.on_ack(view, 5)
    assert calls.made == ["fourth", "fifth"]


def test_who_waits_is_not_served_by_an_acknowledgement_of_the_future() -> None:
    calls, view = _Calls(), _view(sent=3)
    calls.wait("fourth", {view: 4})  # which is on its way
    calls.revocations.on_ack(view, 9)
    assert calls.made == []
    view.seq_sent = 4
    calls.revocations.on_ack(view, 4)
    assert calls.made == ["fourth"]


def test_acknowledgements_do_not_go_back() -> None:
    calls, view = _Calls(), _view(sent=3, acked=2)
    calls.revocations.on_ack(view, 1)
    assert view.seq_acked == 2
    calls.wait("second", {view: 2})
    assert calls.made == ["second"]


def test_a_call_waits_for_every_peer() -> None:
    calls, one, two = _Calls(), _view(sent=1), _view(sent=2)
    calls.wait("both", {one: 1, two: 2})
    calls.wait("one", {one: 1})
    calls.revocations.on_ack(two, 2)
    assert calls.made == []
    calls.revocations.on_ack(one, 1)
    assert calls.made == ["both", "one"]
    calls.wait("none", {})
    assert calls.made[-1] == "none"


def test_a_peer_that_is_gone_is_not_waited_for() -> None:
    calls, one, two = _Calls(), _view(sent=1), _view(sent=1)
    calls.wait("both", {one: 1, two: 1})
    one.gone = True
    calls.revocations.on_gone(one)
    assert calls.made == []
    calls.wait("other", {one: 1, two: 1})
    two.gone = True
    calls.revocations.on_gone(two)
    assert calls.made == ["both", "other"]
    calls.wait("at once", {one: 1})
    assert calls.made[-1] == "at once"

"""Requests at peers, and who may answer them (requests.py)."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

from datadist.caches.peers import PeerView
from datadist.caches.requests import Requests
from datadist.control.messages import Synced


def _view(closed: bool = False) -> PeerView:
    session = SimpleNamespace(closed=closed, send=lambda _message: None)
    return PeerView(cast("Any", session))


def _soon() -> float:
    return time.monotonic() + 0.01


def test_only_the_peer_that_was_asked_answers() -> None:
    requests: Requests[str] = Requests()
    asked, other = _view(), _view()
    with requests.ask(asked, lambda number: Synced(id=number)) as request:
        requests.answer(other, 1, "forged")
        requests.answer(asked, 2, "of another request")
        requests.on_gone(other)
        assert request.wait(_soon()) is None
        assert not request.over.is_set()
        requests.answer(asked, 1, "yes")
        assert request.wait(_soon()) == "yes"
    requests.answer(asked, 1, "too late")


def test_a_peer_that_is_gone_ends_the_wait() -> None:
    requests: Requests[str] = Requests()
    view = _view()
    with requests.ask(view, lambda number: Synced(id=number)) as request:
        requests.on_gone(view)
        assert request.wait(time.monotonic() + 60) is None
    with requests.ask(_view(closed=True), lambda number: Synced(id=number)) as request:
        assert request.wait(time.monotonic() + 60) is None

"""Requests at peers, and who may answer them (requests.py)."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from datadist.caches.peers import PeerView
from datadist.caches.requests import MANY, Request, Requests, Service
from datadist.control.account import Item, LimitExceeded
from datadist.control.messages import MAX_SECONDS, Synced
from tests.interrupts import raising
from tests.waiting import until


def _view(closed: bool = False) -> PeerView:
    session = SimpleNamespace(closed=closed, send=lambda _message: None)
    return PeerView(cast("Any", session))


def _soon() -> float:
    return time.monotonic() + 0.01


def test_only_the_peer_that_was_asked_answers() -> None:
    requests: Requests[str] = Requests()
    asked, other = _view(), _view()

    def wait(request: Request[str]) -> None:
        requests.answer(other, 1, "forged")
        requests.answer(asked, 2, "of another request")
        requests.on_gone(other)
        assert request.wait(_soon()) is None
        assert not request.over.is_set()
        requests.answer(asked, 1, "yes")
        assert request.wait(_soon()) == "yes"

    requests.ask(asked, lambda number: Synced(id=number), wait)
    requests.answer(asked, 1, "too late")


def test_a_peer_that_is_gone_ends_the_wait() -> None:
    requests: Requests[str] = Requests()
    view = _view()

    def wait(request: Request[str]) -> str | None:
        requests.on_gone(view)
        return request.wait(time.monotonic() + 60)

    for asked in (view, _view(closed=True)):
        assert requests.ask(asked, lambda number: Synced(id=number), wait) is None


# -- requests of peers that are served ---------------------------------------------------------

SECONDS = 60.0


@pytest.mark.parametrize(("asked", "given"), [(MAX_SECONDS, 5.0), (1.0, 1.0)])
def test_no_request_has_more_time_than_ours(asked: float, given: float) -> None:
    service, deadlines = Service("test", 1, 1, 5.0), list[float]()
    began = time.monotonic()
    service.submit(_view(), 0, asked, deadlines.append)
    until(lambda: bool(deadlines))
    service.close()
    assert began + given <= deadlines[0] <= time.monotonic() + given


def test_requests_of_one_peer_leave_threads_to_others() -> None:
    service, go_on, begun = Service("test", 3, 2, 5.0), threading.Event(), list[float]()

    def serve(deadline: float) -> None:
        begun.append(deadline)
        go_on.wait(SECONDS)

    greedy, other, served = _view(), _view(), threading.Event()
    for _ in range(10):
        service.submit(greedy, 100, MAX_SECONDS, serve)
    until(lambda: len(begun) == 2)
    assert greedy.account[Item.REQUESTS] == 10
    assert greedy.account[Item.REQUEST_BYTES] == 1000
    service.submit(other, 100, 1.0, lambda _: served.set())
    assert served.wait(SECONDS)
    assert len(begun) == 2
    go_on.set()
    until(lambda: len(begun) == 10)
    until(lambda: greedy.account[Item.REQUESTS] == greedy.account[Item.REQUEST_BYTES] == 0)
    service.close()


def test_the_end_drops_the_requests_that_wait() -> None:
    service, go_on, begun = Service("test", 1, 1, 5.0), threading.Event(), list[float]()

    def serve(deadline: float) -> None:
        begun.append(deadline)
        go_on.wait(SECONDS)

    for _ in range(10):
        service.submit(_view(), 0, 1.0, serve)
    until(lambda: len(begun) == 1)
    ending = threading.Thread(target=service.close)
    ending.start()
    until(lambda: not service._workers._waiting)
    service.submit(_view(), 0, 1.0, serve)
    go_on.set()
    ending.join(SECONDS)
    assert len(begun) == 1


@pytest.mark.parametrize("count", [MANY, 2 * MANY])
def test_who_asks_too_much_at_once_leaves_the_processor_to_others(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, rests = Service("test", 1, 1, 5.0), list[float]()
    monkeypatch.setattr(service, "_ending", SimpleNamespace(wait=rests.append, set=lambda: None))
    view, go_on = _view(), threading.Event()

    def serve(_deadline: float) -> None:
        go_on.wait(SECONDS)
        began = time.thread_time()
        while time.thread_time() < began + 0.001:
            pass

    for _ in range(count):
        service.submit(view, 0, 1.0, serve)
    go_on.set()
    until(lambda: not view.account[Item.REQUESTS])
    service.close()
    assert len(rests) == max(0, count - 1 - MANY)
    assert all(rest >= 0.002 for rest in rests)


@pytest.mark.parametrize("item", [Item.REQUESTS, Item.REQUEST_BYTES])
def test_what_waits_of_one_peer_is_limited(item: Item, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item, "limit", 3)
    service, go_on = Service("test", 2, 1, 5.0), threading.Event()
    greedy, other = _view(), _view()

    def wait(_deadline: float) -> None:
        go_on.wait(SECONDS)

    for _ in range(3):
        service.submit(greedy, 1, 1.0, wait)
    with pytest.raises(LimitExceeded, match=f"it has 4 {item.words}, more than 3"):
        service.submit(greedy, 1, 1.0, lambda _: None)
    service.submit(other, 1, 1.0, lambda _: None)
    go_on.set()
    service.close()


def test_a_request_that_raises_gives_back_what_it_had() -> None:
    service, view = Service("test", 1, 1, 5.0), _view()

    def fail(_deadline: float) -> None:
        raise RuntimeError("a defect")

    service.submit(view, 100, 1.0, fail)
    until(lambda: view.account[Item.REQUESTS] == view.account[Item.REQUEST_BYTES] == 0)
    service.close()


def test_a_request_that_is_interrupted_is_forgotten() -> None:
    requests, view = Requests[str](), _view()

    def call() -> None:
        requests.ask(
            view, lambda number: Synced(id=number), lambda request: request.wait(time.monotonic())
        )

    for where in raising(call):
        assert not requests._open, where

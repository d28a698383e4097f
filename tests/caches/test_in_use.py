"""Memory in use by pulls is neither acknowledged as let go nor given back (peers.py, owned.py).

What comes between two steps of another thread is put there, instead of hoping for it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import cast

import pytest

from datadist.caches.memory import Memory
from datadist.caches.owned import Layout, OwnCache, OwnDirectory
from datadist.caches.peers import PeerView
from datadist.caches.pool import Run
from datadist.caches.quarantine import Quarantine
from datadist.control.messages import Ack, Directory, Message
from datadist.control.session import Session
from datadist.transport import Placement
from tests.waiting import until


class _Peer:
    """A session that notes what it was to send."""

    def __init__(self) -> None:
        self.acknowledged: list[int] = []
        self.interrupted = False

    def send(self, message: Message) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        assert isinstance(message, Ack)
        self.acknowledged.append(message.seq)

    send_soon = send


class _Noted(set[int]):
    """Something happens just before the first token comes or goes."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        super().__init__()
        self._meanwhile = [meanwhile]

    def _step(self) -> None:
        if self._meanwhile:
            self._meanwhile.pop()()

    def add(self, token: int) -> None:
        self._step()
        super().add(token)

    def discard(self, token: object) -> None:
        self._step()
        super().discard(token)


class _Steps(deque[object]):
    """Something happens just before an item comes."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        super().__init__()
        self._meanwhile = meanwhile

    def append(self, item: object) -> None:
        self._meanwhile()
        super().append(item)


def _view() -> tuple[PeerView, _Peer]:
    peer = _Peer()
    return PeerView(cast("Session", peer)), peer


def _change(view: PeerView, seq: int) -> None:
    view.apply(Directory(seq=seq, reset=False, last=True, upsert=[], remove=[]))


def test_a_change_is_acknowledged_when_the_pulls_before_it_have_ended() -> None:
    view, peer = _view()
    first, second, late = 1, 2, 3
    assert view.begin_pull_at(0, first)
    assert view.begin_pull_at(0, second)
    _change(view, 1)
    assert view.begin_pull_at(1, late)
    _change(view, 2)
    view.end_pull(first)
    assert peer.acknowledged == []
    view.end_pull(second)
    assert peer.acknowledged == [1]
    view.end_pull(late)
    assert peer.acknowledged == [1, 2]
    _change(view, 3)
    assert peer.acknowledged == [1, 2, 3]


def test_a_pull_does_not_begin_by_what_has_just_changed() -> None:
    view, peer = _view()
    view.pulls = _Noted(lambda: _change(view, 1))
    assert not view.begin_pull_at(0, 1)
    assert peer.acknowledged == [1]
    assert not view.pulls


def test_a_pull_that_ends_while_a_change_looks_for_it_holds_nothing_up() -> None:
    view, peer = _view()
    assert view.begin_pull_at(0, 1)
    view.deferred = cast("deque[tuple[set[int], int]]", _Steps(lambda: view.end_pull(1)))
    _change(view, 1)
    assert peer.acknowledged == [1]


def test_an_acknowledgement_that_is_interrupted_is_sent_with_the_next_pull() -> None:
    view, peer = _view()
    assert view.begin_pull_at(0, 1)
    _change(view, 1)
    peer.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        view.end_pull(1)
    peer.interrupted = False
    assert view.begin_pull_at(1, 2)
    view.end_pull(2)
    assert peer.acknowledged == [1]


class _Pages:
    """Memory that notes what came back."""

    def __init__(self) -> None:
        self.quarantine = Quarantine()
        self.back: list[int] = []
        self.released_by_peers: list[tuple[int, ...]] = []

    def unregister(self, regions: tuple[int, ...], user: int) -> None:
        """The transport may forget these."""
        self.released_by_peers.append(regions)

    unregister_later = unregister

    def expect(self, placement: Placement, owner: int, pages: int) -> None:
        """Nothing to do."""

    def give_back(self, placement: Placement, owner: int, runs: list[Run]) -> None:
        self.back += [page for page, _ in runs]


def _owned(pooled: bool = True) -> tuple[OwnDirectory, OwnCache, _Pages]:
    """A directory with cache 1, whose base address is 7, in region 3 where it is registered."""
    pages = _Pages()
    owned = OwnDirectory(cast("Memory", pages))
    layout = Layout(True, (7,), 1, 1, 1, Placement.HOST, 2)
    cache = OwnCache(
        1, layout, pooled, accessible=False, regions=() if pooled else (3,), runs=[(7, 1)]
    )
    owned.add(cache, [], unique=False)
    return owned, cache, pages


def test_memory_comes_back_after_the_last_transfer_that_uses_it() -> None:
    owned, cache, pages = _owned()
    assert owned.pin(cache, 1)
    assert owned.pin(cache, 2)
    owned.deallocate(1)
    assert not owned.pin(cache, 3)
    owned.unpin(cache, 1)
    owned.unpin(cache, 1)
    assert pages.back == []
    owned.unpin(cache, 2)
    assert pages.back == [7]


def test_a_cache_that_is_being_freed_is_not_used_any_more() -> None:
    owned, cache, pages = _owned()
    cache.pins = _Noted(lambda: owned.deallocate(1))
    assert not owned.pin(cache, 1)
    assert pages.back == [7]
    assert not cache.pins


def test_memory_that_is_freed_while_the_last_transfer_ends_comes_back() -> None:
    owned, cache, pages = _owned()
    assert owned.pin(cache, 1)
    cache.pins = _Noted(lambda: owned.deallocate(1))
    set.add(cache.pins, 1)
    owned.unpin(cache, 1)
    assert pages.back == [7]


@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize("transfers", [1, 2])
def test_registered_memory_is_let_go_after_the_last_transfer_that_uses_it(
    transfers: int, certain: bool
) -> None:
    owned, cache, pages = _owned(pooled=False)
    tokens = range(1, transfers + 1)
    assert all(owned.pin(cache, token) for token in tokens)
    thread = threading.Thread(target=owned.unregister, args=(1, 60, certain))
    thread.start()
    until(lambda: not cache.held)
    for token in tokens:
        thread.join(0.1)  # there is no peer that it waits for
        assert pages.released_by_peers == []
        assert not owned.pin(cache, 99)
        owned.unpin(cache, token)
    thread.join(20)
    assert pages.released_by_peers == [(3,)]
    assert pages.back == []


def test_unregister_returns_at_once_without_transfers() -> None:
    owned, _, pages = _owned(pooled=False)
    owned.unregister(1, 60, certain=True)
    assert pages.released_by_peers == [(3,)]
    owned.unregister(1, 60, certain=True)
    assert pages.released_by_peers == [(3,)]

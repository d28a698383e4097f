"""Peers whose connection ended while their process lives (lost_peers.py)."""

from __future__ import annotations

import os
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, cast

import pytest

from datadist.caches.owned import OwnDirectory
from datadist.control.reactor import Reactor
from datadist.control.session import Descriptor
from datadist.links.building import Builder
from datadist.links.domain import Attempt
from datadist.links.lost_peers import LostPeers
from tests.waiting import until

PEER = "0" * 32


class World:
    """A peer that is a real process, and what core finds out about it."""

    def __init__(self) -> None:
        self.reactor = Reactor("test")
        self.process = subprocess.Popen(["sleep", "60"])
        self.linked = True
        self.gone: list[str] = []
        self.all_gone = threading.Event()
        self.writers: set[str] = set()
        self.writing, self.aborted = False, 0
        builder = SimpleNamespace(
            reaches=lambda _: self.linked, writers=self.writers,
            is_writing=lambda _: self.aborted > 0 and self.writing,
        )  # fmt: skip
        publication = SimpleNamespace(on_connection_lost=lambda _: None, on_gone=self._on_gone)
        owned = SimpleNamespace(publication=publication)
        self.descriptors: list[weakref.ref[Descriptor]] = []
        self.lost_peers = LostPeers(
            self.reactor, cast("Builder", builder), cast("OwnDirectory", owned), one_sided=True
        )
        self._closed = cast("Callable[[Any, frozenset[int]], None]", builder.on_closed)

    def _on_gone(self, view: Any) -> None:
        self.gone.append(view.name)
        if len(self.gone) == 2:
            self.all_gone.set()

    def lose(self, name: str) -> None:
        """A session with the peer ends; what it was told is unanswered."""
        view = SimpleNamespace(name=name, incarnation=PEER, seq_sent=1, seq_acked=0)
        process = Descriptor(os.pidfd_open(self.process.pid))
        self.descriptors.append(weakref.ref(process))
        self._lose(view, process, unseen=False)

    def _lose(self, view: Any, process: Descriptor | None, unseen: bool) -> None:
        def abort() -> None:
            self.aborted += 1

        self.reactor.call(lambda: self.lost_peers.on_lost(view, process, unseen, abort), 10)

    def lose_unseen(self, name: str) -> None:
        """The same, where the kernel gives no descriptor of the process."""
        view = SimpleNamespace(name=name, incarnation=PEER, seq_sent=1, seq_acked=0)
        self._lose(view, None, unseen=True)

    def end(self, name: str) -> None:
        """It finalizes, and so touches nothing any more."""
        self._lose(
            SimpleNamespace(name=name, incarnation=PEER, seq_sent=1, seq_acked=0), None, False
        )

    def close_link(self, possible_writers: frozenset[int] = frozenset()) -> None:
        """A link to it is closed here."""
        attempt = SimpleNamespace(members={1: SimpleNamespace(incarnation=PEER)})
        self._closed(cast("Attempt", attempt), possible_writers)
        self.reactor.call(lambda: None, 10)


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    with ExitStack() as stack:
        stack.callback(made.reactor.stop)
        stack.callback(made.process.wait)
        stack.callback(made.process.kill)
        yield made


def test_a_peer_that_is_lost_twice_is_gone_for_both(world: World) -> None:
    world.lose("first")
    world.lose("second")
    world.close_link()
    assert world.gone == []
    world.linked = False
    world.close_link()
    assert sorted(world.gone) == ["first", "second"]


def test_a_peer_that_was_inside_is_gone_with_its_process(world: World) -> None:
    world.lose("first")
    world.linked = False
    world.close_link(frozenset({1}))
    world.lose("second")
    world.close_link()
    world.reactor.call(lambda: None, 10)
    assert world.gone == []
    world.process.kill()
    assert world.all_gone.wait(60)
    world.reactor.call(lambda: None, 10)
    assert sorted(world.gone) == ["first", "second"]


@pytest.mark.parametrize("how", ["ended", "killed"])
def test_a_peer_is_gone_once_this_process_has_written_what_it_had_sent(
    world: World, how: str
) -> None:
    world.writing = True
    if how == "ended":
        world.end("first")
    else:
        world.lose("first")
        world.process.kill()
        world.process.wait(60)
    for _ in range(5):
        time.sleep(0.02)
        world.reactor.call(lambda: None, 10)
    assert world.gone == []
    world.writing = False
    until(lambda: world.gone == ["first"])


def test_the_end_of_the_engine_closes_the_descriptors_of_lost_peers(world: World) -> None:
    world.lose("first")
    (process,) = world.descriptors
    world.reactor.call(world.lost_peers.close, 10)
    until(lambda: process() is None)  # the thread has let go of its last call
    assert world.gone == []


def test_an_unseen_peer_is_gone_once_its_link_is_closed(world: World) -> None:
    world.lose_unseen("first")
    assert world.gone == []
    world.linked = False
    world.close_link()
    assert world.gone == ["first"]


def test_an_unseen_peer_without_a_link_is_gone_at_once(world: World) -> None:
    world.linked = False
    world.lose_unseen("first")
    assert world.gone == ["first"]


@pytest.mark.parametrize("closed_before", [True, False])
def test_an_unseen_peer_that_was_inside_is_never_gone(world: World, closed_before: bool) -> None:
    if closed_before:
        world.linked = False
        world.writers.add(PEER)
    world.lose_unseen("first")
    world.linked = False
    world.close_link(frozenset() if closed_before else frozenset({1}))
    world.close_link()
    assert world.gone == []
    world.reactor.call(world.lost_peers.close, 10)

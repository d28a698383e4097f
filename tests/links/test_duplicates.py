"""Whom an engine warns of cluster ids that are used twice, and how often (duplicates.py)."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, cast

import pytest

from datadist.caches.peers import PeerView
from datadist.control.discovery import Discovery
from datadist.control.messages import Duplicate, Hello, Message
from datadist.control.runtime_dir import Address
from datadist.control.session import Descriptor
from datadist.links.domain import Domain
from datadist.links.duplicates import MAX_REPORTS_PER_PEER, Duplicates
from tests.forming import until_synced
from tests.in_process_engine import Engine

OURS, THEIRS = 1, 2
FAR = "10.0.0.7:26000"


class Peer:
    """An engine that ours has met: a process of this host, or at an address of another one."""

    def __init__(self, number: int, cluster: int, where: int | str) -> None:
        self.incarnation = f"{number:032x}"
        self.heard: list[Message] = []
        self.hung_up = False
        """Whether it has ended its connection, which nobody has noticed yet."""
        near = isinstance(where, int)
        self.session = SimpleNamespace(
            cluster_id=cluster, peer_and_program=f"engine {number}", closed=False, drain=self._drain,
            process=Descriptor(os.pidfd_open(cast("int", where))) if near else None,
            address=None if near else where,
        )  # fmt: skip

    def _drain(self) -> None:
        self.session.closed |= self.hung_up

    def send(self, message: Message) -> None:
        """What our engine tells it."""
        self.heard.append(message)


class World:
    """What our engine of cluster 1 meets; it is linked with cluster 2."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._views: dict[str, PeerView] = {}
        self.beside: Any = None
        """Who was refused beside each engine, as its claim says."""
        discovery = SimpleNamespace(
            address=Address(OURS, "f" * 32),
            on_refused=None,
            claims=SimpleNamespace(refused_beside=lambda _engine: self.beside),
        )
        domain = SimpleNamespace(ranks={OURS: 0, THEIRS: 1})
        self.duplicates = Duplicates(
            cast("Discovery", discovery), self._views, lambda: [cast("Domain", domain)]
        )
        self._on_refused = cast("Callable[[Hello, int | None], None]", discovery.on_refused)

    def process(self) -> subprocess.Popen[bytes]:
        """A process that an engine may be in."""
        made = self._stack.enter_context(subprocess.Popen(["sleep", "60"]))
        self._stack.callback(made.kill)
        return made

    def meet(self, number: int, where: int | str | None = None, cluster: int = THEIRS) -> Peer:
        """A session with an engine begins."""
        peer = Peer(number, cluster, self.process().pid if where is None else where)
        self.say_hello(peer)
        return peer

    def say_hello(self, peer: Peer) -> None:
        """A session begins with an engine that may have been met before."""
        view = cast("PeerView", peer)
        self._views[peer.incarnation] = view
        self.duplicates.on_session(view)

    def refuse(self, number: int, cluster: int) -> None:
        """An engine tells ours that it may not link."""
        hello = Hello(wire=1, incarnation=f"{number:032x}", cluster_id=cluster, refused=True)
        self._on_refused(hello, 4711)

    def link(self, *peers: Peer) -> None:
        """A link with these is complete."""
        members = [SimpleNamespace(cluster_id=THEIRS, incarnation=p.incarnation) for p in peers]
        domain = SimpleNamespace(attempt=SimpleNamespace(members=dict(enumerate(members))))
        self.duplicates.on_linked(cast("Domain", domain))


@pytest.fixture
def world() -> Iterator[World]:
    with ExitStack() as stack:
        yield World(stack)


def _warnings(caplog: pytest.LogCaptureFixture, text: str) -> int:
    return sum(text in record.getMessage() for record in _records(caplog))


def _records(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What was logged here: threads of earlier tests may log other things yet."""
    return [record for record in caplog.records if record.module == "duplicates"]


# -- two that live -------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [None, FAR])
def test_two_live_engines_of_one_cluster_id_are_one_warning(
    world: World, caplog: pytest.LogCaptureFixture, where: str | None
) -> None:
    first = world.meet(1, where)
    second = world.meet(2, where)
    for peer in (first, second):
        world.say_hello(peer)
    assert _warnings(caplog, "two live engines: engine 1, and engine 2") == 1
    assert len(_records(caplog)) == 1
    world.meet(3, where)
    assert len(_records(caplog)) == 3, "one for each other pair"


def test_engines_of_different_cluster_ids_are_no_warning(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.meet(1)
    world.meet(2, cluster=THEIRS + 1)
    assert not _records(caplog)


def test_the_successor_of_an_engine_whose_process_has_ended_is_no_warning(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    process = world.process()
    world.meet(1, process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    world.meet(2)
    assert not _records(caplog)


@pytest.mark.parametrize("where", [None, FAR])
def test_the_successor_of_an_engine_that_hung_up_is_no_warning(
    world: World, caplog: pytest.LogCaptureFixture, where: str | None
) -> None:
    """Also where the end of the first one's connection was not handled yet."""
    first = world.meet(1, where)
    first.hung_up = True
    world.meet(2, where)
    assert not _records(caplog)


# -- those that were refused ---------------------------------------------------------------------


def test_engines_of_other_hosts_are_told_who_was_refused_beside_us(world: World) -> None:
    """Those that we have met and those that come; the ones of this host see it themselves."""
    near, far = world.meet(1), world.meet(2, FAR)
    world.refuse(8, OURS)
    late = world.meet(3, FAR)
    for peer in (far, late):
        (message,) = peer.heard
        assert isinstance(message, Duplicate)
        assert message.what == "refused"
        assert "pid 4711" in message.other
    assert near.heard == []


def test_engines_that_were_refused_elsewhere_are_no_word_to_other_hosts(world: World) -> None:
    far = world.meet(1, FAR)
    world.refuse(8, THEIRS)
    assert far.heard == []


@pytest.mark.parametrize("cluster", [OURS, THEIRS])
def test_each_refused_engine_is_one_warning(
    world: World, caplog: pytest.LogCaptureFixture, cluster: int
) -> None:
    for _ in range(3):
        world.refuse(8, cluster)
    assert len(_records(caplog)) == 1
    world.refuse(9, cluster)
    assert len(_records(caplog)) == 2


def test_a_refusal_of_an_engine_that_we_do_not_link_with_is_no_warning(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.refuse(8, THEIRS + 1)
    assert not _records(caplog)


def test_who_was_refused_beside_a_member_is_one_warning_over_all_links(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    peer = world.meet(1)
    world.link(peer)
    assert not _records(caplog)
    world.beside = SimpleNamespace(incarnation=f"{8:032x}")
    for _ in range(2):
        world.link(peer)
    assert _warnings(caplog, f"a second engine with cluster id {THEIRS}") == 1
    assert len(_records(caplog)) == 1


# -- what a peer tells ---------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["replaced", "took", "refused"])
def test_a_peer_can_cause_so_many_warnings_and_no_more(engine: Engine, what: str) -> None:
    first, second = engine.raw_peer(1), engine.raw_peer(2, cluster=3)
    for raw_peer in (first, second):
        for number in range(MAX_REPORTS_PER_PEER + 5):
            assert raw_peer.say({"kind": "duplicate", "what": what, "other": f"other{number}"})
        until_synced(raw_peer)
    told = [line for line in engine.log if line.startswith("WARNING") and "other" in line]
    assert len(told) == 2 * MAX_REPORTS_PER_PEER

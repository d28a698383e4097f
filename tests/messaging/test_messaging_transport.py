"""What a process holds: threads, endpoints, processor time."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from datadist.messaging import dispatcher, session
from datadist.messaging.engine import EngineError
from datadist.transport import Availability, OptionError, Peer, TransportError, TransportOptions
from tests.messaging_links import FAR, Node, attach_links, linked, nodes, open_links, until, whole
from tests.pair_engine import PairEngine, PairTransport

LINKS = 100


def _endpoints(node: Node) -> int:
    return len(node.transport.engine.endpoints)


def _has_no_sides(node: Node) -> bool:
    return not node.transport._dispatcher._sides


def _threads() -> int:
    return Counter(thread.name for thread in threading.enumerate())["datadist-messaging"]


def test_links_with_one_peer_share_an_endpoint_and_a_thread() -> None:
    with nodes() as members:
        threads = _threads()
        links = [open_links(members) for _ in range(LINKS)]
        for pair in links:
            attach_links(pair)
            pair[0].read(1, *whole(members[0], members[1], 64), FAR)
        assert [_endpoints(node) for node in members] == [1, 1]
        assert _threads() <= threads
        for pair in links:
            for link in pair:
                link.close()
        for node in members:
            until(partial(_has_no_sides, node))


def _rests(engines: Sequence[PairEngine]) -> bool:
    """Whether nothing is done for a second."""
    polls, used = [each.polls for each in engines], time.process_time()
    time.sleep(1)
    return [each.polls for each in engines] == polls and time.process_time() - used < 0.5


def test_an_idle_process_with_many_links_does_nothing() -> None:
    with nodes() as members:
        links = [open_links(members) for _ in range(LINKS)]
        for pair in links:
            attach_links(pair)
        engines = [node.transport.engine for node in members]
        links[0][0].read(1, *whole(members[0], members[1], 64), FAR)
        until(lambda: all(node.transport._dispatcher.loop._tick_at is None for node in members))
        until(lambda: _rests(engines))  # something of what was said before may come yet
        assert sum(_rests(engines) for _ in range(4)) >= 3, "it does something again and again"
        for pair in links:
            for link in pair:
                link.close()


def test_endpoints_are_closed_when_both_ends_have_no_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "UNUSED_SECONDS", 0.1)
    with nodes() as members:
        for _ in range(3):
            with linked(members) as (link, _):
                link.read(1, *whole(members[0], members[1]), FAR)
            until(lambda: not any(map(_endpoints, members)))


def test_an_endpoint_is_open_while_the_peer_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In some engines both endpoints are one connection."""
    monkeypatch.setattr(dispatcher, "UNUSED_SECONDS", 0.1)
    with nodes() as (mine, theirs):
        ours, others = open_links([mine, theirs])
        attach_links([ours, others])
        ours.read(1, *whole(mine, theirs), FAR)
        ours.close()
        until(lambda: not mine.transport._dispatcher._by_incarnation)
        assert _endpoints(mine) == 1
        with linked([mine, theirs]) as (link, _):
            link.read(1, *whole(mine, theirs), FAR)
        others.close()
        until(lambda: not _endpoints(mine) + _endpoints(theirs))


@pytest.mark.parametrize("used", [True, False])
def test_a_link_outlives_an_endpoint_that_the_peer_has_retired(
    used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In some engines both endpoints are one connection: who goes on needs another one."""
    monkeypatch.setattr(session, "RETIRED_SECONDS", 0.5)
    monkeypatch.setattr(dispatcher, "UNUSED_SECONDS", 3600.0)
    with nodes(kinds=[PairTransport]) as (mine, theirs):
        ours, others = open_links([mine, theirs])
        attach_links([ours, others])
        ours.read(1, *whole(mine, theirs), FAR)
        (old,) = theirs.transport._dispatcher._by_secret.values()
        endpoint = old.endpoint
        ours.close()
        if not used:
            others.close()
        (retired,) = mine.transport._dispatcher._by_secret.values()
        mine.on_thread(lambda: mine.transport._dispatcher.retire(retired))
        until(lambda: old.ended or old.endpoint is not endpoint)
        with linked([mine, theirs]) as (link, other):
            until(lambda: retired.ended)
            for _ in range(2):
                link.read(1, *whole(mine, theirs), FAR)
                other.read(0, *whole(theirs, mine), FAR)
        others.close()


def test_core_keeps_the_endpoint_between_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "UNUSED_SECONDS", 0.0)
    with nodes() as (mine, theirs):
        held = [(mine, Peer(1, theirs.name)), (theirs, Peer(0, mine.name))]
        for node, peer in held:
            assert node.transport.connect(peer) is not None
        for _ in range(2):
            with linked([mine, theirs]) as (link, _):
                link.read(1, *whole(mine, theirs), FAR)
            time.sleep(0.6)  # longer than a tick
            assert _endpoints(mine) == _endpoints(theirs) == 1
        for node, peer in held:
            node.transport.disconnect(peer)
        until(lambda: not _endpoints(mine) + _endpoints(theirs))


def test_a_transport_that_was_closed_leaves_nothing() -> None:
    before = _threads()
    for _ in range(3):
        with nodes() as members, linked(members) as (link, _):
            link.read(1, *whole(members[0], members[1]), FAR)
    until(lambda: _threads() <= before)


def test_the_example_of_the_documentation_moves_bytes() -> None:
    page = (Path(__file__).parents[2] / "docs" / "transports.md").read_text()
    code = page.partition("A whole transport")[2].partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    with nodes(kinds=[names["DatagramTransport"]]) as members, linked(members) as (link, _):
        members[0].fill(1)
        members[1].fill(2)
        link.read(1, *whole(members[0], members[1]), FAR)
        assert set(bytes(members[0].memory)) == {2}
        members[0].fill(3)
        link.write(1, *whole(members[0], members[1]), FAR)
        assert set(bytes(members[1].memory)) == {3}


def test_an_engine_that_does_not_open_is_a_transport_error() -> None:
    class Broken(PairTransport):
        @classmethod
        def probe(cls) -> Availability:
            return Availability(True, "")

        def make_engine(self, options: TransportOptions) -> PairEngine:
            raise EngineError("there is no device")

    with pytest.raises(TransportError, match="there is no device"):
        Broken(TransportOptions())
    with pytest.raises(OptionError):
        PairTransport(TransportOptions(extra={"nonsense": "1"}))


def test_a_thread_that_does_not_start_is_a_transport_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("datadist.base.threads.start", refuse)
    with pytest.raises(TransportError, match="no thread for the engine"):
        PairTransport(TransportOptions())


def test_the_peers_of_a_closed_transport_are_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with nodes() as (mine, theirs), linked([mine, theirs]) as (link, owners):
        link.read(1, *whole(mine, theirs), FAR)
        owners.close()
        theirs.transport.close()
        until(lambda: link._sides[1].ended)

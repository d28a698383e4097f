"""What links with one peer share: made once before the first one, given back once after the last one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from datadist_shm import ShmTransport

from datadist import CacheDesc, DataType
from datadist.links import building
from datadist.links.domain import Attempt
from datadist.links.peer_connections import PeerConnections
from datadist.transport import Group, LinkError, Peer, TransportOptions
from tests import nodes, recording_transport
from tests.nodes import Node, RemoteError
from tests.waiting import until

Start = Callable[..., Node]
BACKEND = "tests.recording_transport:RecordingTransport"


def _start(start: Start, *clusters: int) -> list[Node]:
    return [start(cluster, pool=1 << 20, transfer_backend=BACKEND) for cluster in clusters]


def _events(here: nodes.Here, *kinds: str) -> list[tuple[Any, ...]]:
    return [event for event in recording_transport.EVENTS if not kinds or event[0] in kinds]


def _kinds(node: Node) -> list[str]:
    kinds = "connect", "connect fails", "open", "close", "disconnect", "lost", "end"
    return [event[0] for event in node.do(_events, *kinds)]


def _threads(here: nodes.Here, what: str) -> set[str]:
    return recording_transport.THREADS.get(what, set())


def _fail(here: nodes.Here, what: str, fails: bool = True, kind: str = "LINK_ERROR") -> None:
    recording_transport.FAILING.pop(what, None)
    if fails:
        error = RuntimeError("a defect") if kind == "defect" else getattr(recording_transport, kind)
        recording_transport.FAILING[what] = error


def _gate(here: nodes.Here, what: str) -> None:
    recording_transport.GATES[what] = threading.Event()


def _let_go(here: nodes.Here, what: str) -> None:
    recording_transport.GATES.pop(what).set()


def _waits(here: nodes.Here, what: str) -> bool:
    return what in recording_transport.WAITING


def _link(name: str, *group: tuple[int, Node]) -> list[int]:
    mapping = {cluster: rank for rank, (cluster, _) in enumerate(group)}
    for _, node in group:
        node.begin(nodes.link_and_wait, name, mapping)
    return [int(node.result()) for _, node in group]


def _counts(node: Node) -> tuple[int, int]:
    """Connects and disconnects, whose order is right."""
    events = node.do(_events, "connect", "disconnect")
    live: set[str] = set()
    for what, peer in events:
        assert (peer in live) == (what == "disconnect"), events
        (live.add if what == "connect" else live.discard)(peer)
    kinds = [event[0] for event in events]
    return kinds.count("connect"), kinds.count("disconnect")


def test_a_transport_without_connections_is_not_asked_for_them() -> None:
    connections = PeerConnections(ShmTransport(TransportOptions()), lambda _call: None)
    attempt = Attempt("0" * 32, 0, [0, 1], {})
    group = Group("pair", 0, {0: Peer(0, "a" * 32), 1: Peer(1, "b" * 32)}, None, 0.0)
    assert connections.connect(attempt, group) is group
    assert attempt.connections == []
    attempt.closed = True
    with pytest.raises(LinkError, match="given up meanwhile"):
        connections.connect(attempt, group)
    connections.close()
    with pytest.raises(LinkError, match="given up meanwhile"):
        connections.connect(Attempt("1" * 32, 0, [0, 1], {}), group)


def test_links_with_one_peer_connect_once_and_the_last_one_disconnects(start_node: Start) -> None:
    we, peer = _start(start_node, 1, 2)
    ids = [_link(f"link{number}", (1, we), (2, peer))[0] for number in range(3)]
    assert _kinds(we) == ["connect", *["open"] * 3]
    we.do(nodes.unlink, ids[1])
    we.do(nodes.unlink, ids[0])
    assert _counts(we) == (1, 0)
    we.do(nodes.unlink, ids[2])
    assert _kinds(we)[-2:] == ["close", "disconnect"]
    assert _counts(we) == (1, 1)
    for number in (1, 2, 3):
        peer.do(nodes.unlink, number)
    _link("again", (1, we), (2, peer))
    assert _counts(we) == (2, 1)
    we.do(nodes.finalize)
    assert _kinds(we)[-3:] == ["close", "disconnect", "end"]
    assert all("control" not in name for name in we.do(_threads, "connect"))


def test_each_member_of_a_link_has_a_connection_of_its_own(start_node: Start) -> None:
    group = _start(start_node, 1, 2, 3)
    ids = _link("three", *zip((1, 2, 3), group, strict=True))
    for node, comm_id in zip(group, ids, strict=True):
        assert _counts(node) == (2, 0)
        node.do(nodes.unlink, comm_id)
        assert _counts(node) == (2, 2)


def test_links_that_are_opened_at_once_connect_once(start_node: Start) -> None:
    we, peer = _start(start_node, 1, 2)
    we.do(_gate, "connect")
    mapping = {1: 0, 2: 1}
    for node in (we, peer):
        for number in range(2):
            node.do(nodes.link, f"link{number}", mapping)
    until(lambda: bool(we.do(_waits, "connect")))
    we.do(_let_go, "connect")
    for node in (we, peer):
        for comm_id in (1, 2):
            node.do(nodes.wait, comm_id)
    assert sorted(_kinds(we)) == ["connect", "open", "open"]
    assert {event[2] for event in we.do(_events, "open")} == {0}
    we.do(nodes.finalize)
    assert _counts(we) == (1, 1)


@pytest.mark.parametrize("what", ["connect", "opening"])
@pytest.mark.parametrize("kind", ["LINK_ERROR", "defect"])
def test_what_a_failed_link_has_is_given_back(start_node: Start, what: str, kind: str) -> None:
    we, peer = _start(start_node, 1, 2)
    we.do(_fail, what, True, kind)
    for node in (we, peer):
        node.do(nodes.link, "pair", {1: 0, 2: 1})
    with pytest.raises(RemoteError, match=r"no endpoint|a defect"):
        we.do(nodes.wait, 1)
    until(lambda: _counts(we) == ((0, 0) if what == "connect" else (1, 1)))
    we.do(_fail, what, False)
    for node in (we, peer):
        node.do(nodes.unlink, 1)
    _link("pair", (1, we), (2, peer))
    assert we.do(nodes.finalize) is None
    connects, disconnects = _counts(we)
    assert connects == disconnects == (1 if what == "connect" else 2)


def test_a_peer_that_is_killed_is_lost_once_for_all_links(start_node: Start) -> None:
    we, peer = _start(start_node, 1, 2)
    ids = [_link(f"link{number}", (1, we), (2, peer))[0] for number in range(2)]
    peer.kill()
    until(lambda: bool(we.do(_events, "lost")))
    assert we.do(_threads, "lost") == {"datadist-control"}
    assert _counts(we) == (1, 0), "the links are there still"
    for comm_id in ids:
        we.do(nodes.unlink, comm_id)
    assert _counts(we) == (1, 1)
    we.do(nodes.finalize)
    assert _kinds(we).count("lost") == 1


def test_a_peer_that_is_killed_while_it_is_connected_is_given_back(
    start_node: Start,
) -> None:
    we, peer = _start(start_node, 1, 2)
    _link("first", (1, we), (2, peer))
    we.do(nodes.unlink, 1)
    we.do(_gate, "connect")
    for node in (we, peer):
        node.do(nodes.link, "second", {1: 0, 2: 1})
    until(lambda: bool(we.do(_waits, "connect")))
    peer.kill()
    until(lambda: any("waiting again" in line for line in we.do(nodes.log_of)))
    assert not we.do(_events, "lost")
    we.do(_let_go, "connect")
    until(lambda: _counts(we) == (2, 2))
    we.do(nodes.finalize)
    assert _counts(we) == (2, 2)


def test_a_peer_that_has_finalized_and_comes_again_is_another_one(start_node: Start) -> None:
    we, peer = _start(start_node, 1, 2)
    _link("pair", (1, we), (2, peer))
    peer.do(nodes.finalize)
    until(lambda: bool(we.do(_events, "lost")))
    peer.do(nodes.init, 2, 1 << 20, transfer_backend=BACKEND)
    _link("next", (1, we), (2, peer))
    assert _counts(we) == (2, 0)
    we.do(nodes.unlink, 1)
    assert _counts(we) == (2, 1)
    we.do(nodes.finalize)
    assert _counts(we) == (2, 2)


@pytest.mark.parametrize("what", ["disconnect", "peer_lost"])
def test_what_must_not_raise_and_does_harms_nothing(start_node: Start, what: str) -> None:
    we, peer = _start(start_node, 1, 2)
    _link("pair", (1, we), (2, peer))
    we.do(_fail, "lost" if what == "peer_lost" else what, True, "defect")
    peer.kill()
    until(lambda: bool(we.do(_events, "lost", "lost fails")))
    we.do(nodes.unlink, 1)
    nodes.said(we, "ERROR", "a defect")
    we.do(nodes.finalize)


def test_links_by_address_connect_as_well(
    start_node: Start, free_ports: Callable[[int], list[int]]
) -> None:
    (port,) = free_ports(1)
    options: dict[str, Any] = {"pool": 1 << 20, "transfer_backend": BACKEND, "local_comm_res": ""}
    server = start_node(1, listen_ip_info=f"127.0.0.1:{port}", **options)
    client = start_node(2, **options)
    for _ in range(2):
        assert client.do(nodes.link_clusters, [(1, port)])[0] == "LLM_SUCCESS"
        assert client.do(nodes.unlink_clusters, [(1, port)])[0] == "LLM_SUCCESS"
    assert _counts(client) == (2, 2)
    until(lambda: _counts(server) == (2, 2))


@pytest.mark.parametrize("what", ["connect", "opening", "open"])
def test_a_link_that_takes_too_long_to_open_is_closed_and_gives_back_what_it_has(
    start_node: Start, what: str
) -> None:
    we, peer = _start(start_node, 1, 2)
    we.do(_close_soon)
    we.do(_gate, what)
    for node in (we, peer):
        node.do(nodes.link, "pair", {1: 0, 2: 1})
    until(lambda: bool(we.do(_waits, what)))
    we.do(nodes.unlink, 1)
    assert not we.do(_events, "disconnect"), "it is in use"
    we.do(_let_go, what)
    until(lambda: _counts(we) == (1, 1))
    kinds = _kinds(we)
    assert kinds.count("open") == kinds.count("close")
    assert kinds[-1] == "disconnect"


def _close_soon(here: nodes.Here) -> None:
    building.CLOSE_SECONDS = 0.1


# -- regions ---------------------------------------------------------------------------------


def _register(here: nodes.Here, label: str, *more: str) -> int:
    """Register the array of ``label``; its address."""
    array = here.any.setdefault(label, np.zeros((4, 1024), np.uint8))
    desc = CacheDesc(1, [4, 1024], DataType.DT_UINT8)
    here.caches[more[0] if more else label] = here.live.cache_manager.register_cache(
        desc, [array.ctypes.data]
    )
    return int(array.ctypes.data)


def _unregister(here: nodes.Here, label: str) -> None:
    here.live.cache_manager.unregister_cache(here.caches[label].cache_id)


def _of(node: Node, address: int) -> list[tuple[Any, ...]]:
    return [event for event in node.do(_events) if address in event]


def test_links_hear_of_regions_that_come_and_go(start_node: Start) -> None:
    we, peer = _start(start_node, 1, 2)
    before = we.do(_register, "before")
    first, _ = _link("first", (1, we), (2, peer))
    after = we.do(_register, "after")
    _link("second", (1, we), (2, peer))
    assert we.do(_register, "after", "shared") == after
    assert _of(we, before) == []
    assert _of(we, after) == [("added", "first", after)]
    we.do(_unregister, "after")
    we.do(_unregister, "shared")
    assert len(_of(we, after)) == 1, "the second link exposes it"
    we.do(nodes.unlink, 2)
    assert _of(we, after)[1:] == [("removed", "first", after), ("release", after)]
    last = we.do(_register, "last")
    we.do(nodes.unlink, first)
    we.do(_unregister, "last")
    assert _of(we, last) == [("added", "first", last), ("release", last)], "the link is closed"


def test_a_link_hears_of_a_region_that_it_did_not_take_when_that_is_used_again(
    start_node: Start,
) -> None:
    we, peer = _start(start_node, 1, 2)
    address = we.do(_register, "memory")
    _link("old", (1, we), (2, peer))
    we.do(_unregister, "memory")
    _link("new", (1, we), (2, peer))  # which does not expose what nobody has
    assert _of(we, address) == []
    we.do(_register, "memory")
    assert _of(we, address) == [("added", "new", address)]


@pytest.mark.parametrize("when", ["connect", "opening", "open"])
def test_a_region_that_comes_while_a_link_is_opened_is_told_once(
    start_node: Start, when: str
) -> None:
    we, peer = _start(start_node, 1, 2)
    we.do(_gate, when)
    for node in (we, peer):
        node.do(nodes.link, "pair", {1: 0, 2: 1})
    until(lambda: bool(we.do(_waits, when)))
    stays, goes = we.do(_register, "stays"), we.do(_register, "goes")
    we.do(_unregister, "goes")
    assert we.do(_events, "added") == []
    we.do(_let_go, when)
    we.do(nodes.wait, 1)
    assert _of(we, stays) == [("added", "pair", stays)]
    assert _of(we, goes) == [("release", goes)]
    we.do(_unregister, "stays")
    assert _of(we, stays)[1:] == [("removed", "pair", stays), ("release", stays)]


@pytest.mark.parametrize("kind", ["REGISTRATION_ERROR", "defect"])
def test_a_region_that_a_link_refuses_is_not_registered(start_node: Start, kind: str) -> None:
    we, peer = _start(start_node, 1, 2)
    _link("pair", (1, we), (2, peer))
    we.do(_fail, "added", True, kind)
    with pytest.raises(
        RemoteError, match=r"an open link refuses.*(takes no more|a defect)"
    ) as caught:
        we.do(_register, "memory")
    assert caught.value.status == "LLM_FAILED"
    assert [event[0] for event in we.do(_events, "added fails", "removed", "release")] == [
        "added fails", "release",
    ]  # fmt: skip
    we.do(_fail, "added", False)
    address = we.do(_register, "memory")
    assert _of(we, address)[-1] == ("added", "pair", address)


def test_of_links_that_heard_of_a_region_that_another_one_refuses_all_hear_of_its_end(
    start_node: Start,
) -> None:
    we, peer = _start(start_node, 1, 2)
    for name in ("first", "second"):
        _link(name, (1, we), (2, peer))
    we.do(_refuse_after_one)
    with pytest.raises(RemoteError, match="takes no more"):
        we.do(_register, "memory")
    events = we.do(_events, "added", "added fails", "removed", "release")
    assert [event[0] for event in events] == ["added", "added fails", "removed", "release"]
    assert events[0][1:] == events[2][1:]


def _refuse_after_one(here: nodes.Here) -> None:
    class Later(dict[str, Exception]):
        def __contains__(self, what: object) -> bool:
            added = [event for event in recording_transport.EVENTS if event[0] == "added"]
            return what == "added" and bool(added)

        def __getitem__(self, _what: str) -> Exception:
            return recording_transport.REGISTRATION_ERROR

    recording_transport.FAILING = Later()


def test_a_link_that_refuses_a_region_at_its_opening_fails(start_node: Start) -> None:
    we, peer = _start(start_node, 1, 2)
    we.do(_gate, "opening")
    for node in (we, peer):
        node.do(nodes.link, "pair", {1: 0, 2: 1})
    until(lambda: bool(we.do(_waits, "opening")))
    we.do(_register, "memory")
    we.do(_fail, "added", True, "REGISTRATION_ERROR")
    we.do(_let_go, "opening")
    with pytest.raises(RemoteError, match="takes no more"):
        we.do(nodes.wait, 1)
    until(lambda: _counts(we) == (1, 1))
    assert _kinds(we)[:3] == ["connect", "open", "close"]
    we.do(_unregister, "memory")

"""What a program asks of links: metadata, reasons, events, and who listens at an address."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import Any

import pytest

from datadist import LinkEventKind, LLMConfig, LLMException, LLMStatusCode
from datadist.caches.peers import PeerView
from datadist.control.messages import Ready
from tests import nodes
from tests.in_process_engine import Engine
from tests.nodes import Here, Node

Start = Callable[..., Node]
PAIR = {1: 0, 2: 1}
NOT_YET = LLMStatusCode.LLM_NOT_YET_LINK
MOST = 8192


def _link(here: Here, name: str, mapping: dict[int, int], **options: Any) -> int:
    comm_id = here.live.link(name, mapping, nodes.table_for(mapping), **options)
    here.live.wait_link(comm_id)
    return comm_id


def _metadata(here: Here, *args: Any, **kwargs: Any) -> dict[int, bytes]:
    return here.live.link_metadata(*args, **kwargs)


def _error(here: Here, *args: Any, **kwargs: Any) -> str | None:
    return here.live.link_error(*args, **kwargs)


def _status_of(here: Here, method: str, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(LLMException) as caught:
        getattr(here.live, method)(*args, **kwargs)
    return caught.value.status_code.name


def _next_events(here: Here, count: int) -> list[Any]:
    """That many events, which the descriptor tells of."""
    found: list[Any] = []
    fd = here.live.link_events_fileno()
    while len(found) < count:
        assert select.select([fd], [], [], nodes.SECONDS)[0], f"only {found}"
        found += here.live.link_events()
    return [(e.kind.name, e.comm_id, e.name, e.cluster_ids, e.reason) for e in found]


def test_metadata_of_the_members_of_a_domain(start_node: Start) -> None:
    everybody = {1: 0, 2: 1, 3: 2}
    members = [start_node(n, link_metadata=b"default") for n in everybody]
    given = {1: b"one\x00\xff", 2: b"2" * MOST, 3: None}
    comm_ids = []
    for node, cluster in zip(members, everybody, strict=True):
        node.begin(_link, "three", everybody, metadata=given[cluster])
    for node in members:
        comm_ids.append(node.result())
    expected = {1: given[1], 2: given[2], 3: b"default"}
    for node, cluster, comm_id in zip(members, everybody, comm_ids, strict=True):
        others = {n: data for n, data in expected.items() if n != cluster}
        assert node.do(_metadata, comm_id) == others
        for other, data in others.items():
            assert node.do(_metadata, cluster_id=other) == {other: data}
    first, comm_id = members[0], comm_ids[0]
    assert first.do(_status_of, "link_metadata", cluster_id=9) == NOT_YET.name
    assert first.do(_status_of, "link_metadata", comm_id + 1) == NOT_YET.name
    assert first.do(_status_of, "link_metadata", 1, cluster_id=2) == "LLM_PARAM_INVALID"
    first.do(nodes.unlink, comm_id)
    assert first.do(_status_of, "link_metadata", cluster_id=2) == NOT_YET.name


def _link_clusters(here: Here, clusters: list[tuple[int, int]], **options: Any) -> list[Any]:
    infos = [nodes.cluster_info(cluster, port) for cluster, port in clusters]
    _, results = here.live.link_clusters(infos, 20_000, **options)
    return [(code.name, info.link_error) for code, info in zip(results, infos, strict=True)]


def _listening(start_node: Start, cluster: int, port: int, **options: Any) -> Node:
    return start_node(cluster, local_comm_res="", listen_ip_info=f"127.0.0.1:{port}", **options)


def test_metadata_and_reasons_of_links_by_address(
    start_node: Start, free_ports: Callable[[int], list[int]]
) -> None:
    one, other, nobody = free_ports(3)
    listener = _listening(start_node, 1, one, link_metadata=b"listener")
    _listening(start_node, 4, other, enable_remote_cache_accessible=False)
    client = start_node(2, local_comm_res="")
    found = client.do(_link_clusters, [(1, one), (3, nobody), (4, other)], metadata=b"client")
    assert found[0] == ("LLM_SUCCESS", None)
    assert found[1][0] == "LLM_LINK_FAILED"
    assert f"nobody listens at 127.0.0.1:{nobody}" in found[1][1]
    assert found[2][0] == "LLM_PARAM_INVALID"
    assert "enable_remote_cache_accessible must be equal at both ends" in found[2][1]
    for cluster, (_, reason) in zip((3, 4), found[1:], strict=True):
        assert client.do(_error, cluster_id=cluster) == reason
    assert client.do(_error, cluster_id=1) is None
    assert client.do(_status_of, "link_error", cluster_id=9) == NOT_YET.name
    assert client.do(_metadata, cluster_id=1) == {1: b"listener"}
    assert listener.do(_metadata, cluster_id=2) == {2: b"client"}
    ((code, reason),) = client.do(_link_clusters, [(1, one)])
    assert (code, "cluster 1 is linked already" in reason) == ("LLM_ALREADY_LINK", True)
    events = client.do(_next_events, 2)
    assert ("OK", None, "clusters 1 and 2", (1,), None) in events
    failed = next(event for event in events if event[0] == "FAILED")
    assert failed[3] == (4,)
    assert "must be equal at both ends" in failed[4]
    # the listener, too, may give metadata when it links with who has linked with it already
    port = free_ports(1)[0]
    client.do(nodes.unlink_clusters, [(1, one)])
    client.do(nodes.switch_role, None or _mix(), port)
    assert client.do(_link_clusters, [(1, one)])[0][0] == "LLM_SUCCESS"
    assert listener.do(_link_clusters, [(2, port)], metadata=b"later")[0][0] == "LLM_SUCCESS"
    assert client.do(_metadata_when, 1, b"later") == {1: b"later"}


def _delay_ready(here: Here) -> None:
    """What a peer says of being ready is handled late."""
    builder = here.live._live(NOT_YET)._builder
    on_ready = builder.on_ready

    def later(view: PeerView, message: Ready) -> None:
        time.sleep(0.5)
        on_ready(view, message)

    builder.on_ready = later  # type: ignore[method-assign]


def test_metadata_of_a_peer_that_is_ok_already(
    start_node: Start, free_ports: Callable[[int], list[int]]
) -> None:
    """Its link call has returned: what it said by then is handled first."""
    (port,) = free_ports(1)
    listener = _listening(start_node, 1, port)
    client = start_node(2, local_comm_res="")
    listener.do(_delay_ready)
    assert client.do(_link_clusters, [(1, port)], metadata=b"client")[0][0] == "LLM_SUCCESS"
    assert listener.do(_metadata, cluster_id=2) == {2: b"client"}


def _mix() -> Any:
    from datadist import LLMRole

    return LLMRole.MIX


def _metadata_when(here: Here, cluster: int, wanted: bytes) -> dict[int, bytes]:
    deadline = time.monotonic() + nodes.SECONDS
    while True:
        found = here.live.link_metadata(cluster_id=cluster)
        if found.get(cluster) == wanted or time.monotonic() > deadline:
            return found
        time.sleep(0.01)


def test_who_listens_at_an_address(
    start_node: Start, free_ports: Callable[[int], list[int]]
) -> None:
    port, nobody = free_ports(2)
    _listening(start_node, 77, port)
    client = start_node(2, local_comm_res="")
    assert client.do(_cluster_at, "127.0.0.1", port) == 77
    assert client.do(_status_of, "cluster_at", "127.0.0.1", nobody) == "LLM_LINK_FAILED"
    assert client.do(_status_of, "link_error", cluster_id=77) == NOT_YET.name


def _cluster_at(here: Here, ip: str, port: int) -> int:
    return here.live.cluster_at(ip, port)


def test_events_of_a_link_that_breaks_and_of_one_that_ends(start_node: Start) -> None:
    first, second = start_node(1), start_node(2)
    comm_id, theirs = nodes.link_pair(first, second)
    assert first.do(_next_events, 1) == [("OK", comm_id, "pair", (2,), None)]
    second.do(nodes.unlink, theirs)
    ((kind, number, name, clusters, reason),) = first.do(_next_events, 1)
    assert (kind, number, name, clusters) == ("GONE", comm_id, "pair", (2,))
    assert first.do(_error, cluster_id=2) == reason == first.do(_error, comm_id)
    first.do(nodes.unlink, comm_id)
    comm_id, _ = nodes.link_pair(first, second, "again")
    assert first.do(_next_events, 1)[0][:2] == ("OK", comm_id)
    second.kill()
    ((kind, number, _, clusters, reason),) = first.do(_next_events, 1)
    assert (kind, number, clusters) == ("BROKEN", comm_id, (2,))
    assert reason == first.do(_error, cluster_id=2)


def test_an_event_of_a_link_that_is_not_formed(engine: Engine) -> None:
    comm_id = engine.api.link("nobody", PAIR, nodes.table_for(PAIR))
    engine.api.unlink(comm_id)
    assert engine.api.link_events() == []
    engine.api.finalize()
    with pytest.raises(RuntimeError, match="not initialized"):
        engine.api.link_events()


def test_a_link_that_fails_is_an_event(start_node: Start) -> None:
    node = start_node(1, link_total_time=1)
    comm_id = node.do(nodes.link, "nobody", PAIR)
    ((kind, number, name, clusters, reason),) = node.do(_next_events, 1)
    assert (kind, number, name, clusters) == ("FAILED", comm_id, "nobody", (2,))
    assert reason == node.do(_error, comm_id)


@pytest.mark.parametrize("value", ["text", bytearray(2), 3])
def test_metadata_that_is_no_bytes(engine: Engine, value: Any) -> None:
    with pytest.raises(TypeError, match="metadata is a"):
        engine.api.link("x", PAIR, nodes.table_for(PAIR), metadata=value)
    with pytest.raises(TypeError, match="link_metadata is a"):
        LLMConfig().link_metadata = value


def test_too_much_metadata(engine: Engine) -> None:
    much = b"x" * (MOST + 1)
    for call in (
        lambda: engine.api.link("x", PAIR, nodes.table_for(PAIR), metadata=much),
        lambda: engine.api.link_clusters([], metadata=much),
        lambda: setattr(LLMConfig(), "link_metadata", much),
    ):
        with pytest.raises(LLMException, match="metadata has 8193 bytes") as caught:
            call()
        assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    config = LLMConfig()
    config.link_metadata = much[1:]
    assert len(config.generate_options()["datadist.link_metadata"]) > MOST
    assert LinkEventKind.OK.name == "OK"

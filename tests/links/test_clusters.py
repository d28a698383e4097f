"""Links by address between real processes: who asks whom, what ends them, what is reported."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from datadist import BlocksCacheKey, LLMRole, LLMStatusCode
from datadist.control.messages import Form, Refused
from datadist.transport import Link
from tests import nodes
from tests.forming import GOOD, until_synced
from tests.in_process_engine import Engine, Sent
from tests.nodes import Node, RemoteError, pattern
from tests.raw_peer import RawPeer
from tests.waiting import until

Start = Callable[..., Node]
Ports = Callable[[int], list[int]]
OK = ("LLM_SUCCESS", ["LLM_SUCCESS"])


def _listening(start: Start, cluster: int, port: int, **settings: object) -> Node:
    node = start(cluster, listen_ip_info=f"127.0.0.1:{port}", local_comm_res="", **settings)
    node.do(nodes.make, "blocks", "blocks", [8, 100], 4, BlocksCacheKey(cluster, 0))
    node.do(nodes.fill, "blocks", cluster)
    return node


def _block(node: Node, block: int) -> list[int]:
    return [int(array[block][0]) for array in node.do(nodes.read, "blocks")]


def _expected(cluster: int, block: int) -> list[int]:
    return [int(pattern(cluster, tensor, (8, 100))[block][0]) for tensor in range(4)]


def test_a_link_works_in_both_directions_at_once(start_node: Start, free_ports: Ports) -> None:
    (port,) = free_ports(1)
    server, client = _listening(start_node, 1, port), start_node(2, local_comm_res="")
    client.do(nodes.make, "blocks", "blocks", [8, 100], 4, BlocksCacheKey(2, 0))
    client.do(nodes.fill, "blocks", 2)
    assert client.do(nodes.link_clusters, [(1, port)]) == OK
    client.do(nodes.pull_blocks, BlocksCacheKey(1, 0), "blocks", [3], [5])
    assert _block(client, 5) == _expected(1, 3)
    server.do(nodes.push_blocks, BlocksCacheKey(2, 0), "blocks", [1], [7])
    assert _block(client, 7) == _expected(1, 1)
    server.do(nodes.pull_blocks, BlocksCacheKey(2, 0), "blocks", [2], [0])
    assert _block(server, 0) == _expected(2, 2)
    assert client.do(nodes.unlink_clusters, [(1, port)]) == OK
    with pytest.raises(RemoteError) as error:
        server.do(nodes.pull_blocks, BlocksCacheKey(2, 0), "blocks", [2], [0])
    assert error.value.status == "LLM_NOT_YET_LINK"
    server.do(nodes.switch_role, LLMRole.DECODER)


def _attach_slowly(here: nodes.Here) -> None:
    from datadist_shm.link import ShmLink

    attach = ShmLink.attach

    def slowly(link: ShmLink, *args: Any) -> None:
        time.sleep(0.5)
        attach(link, *args)

    ShmLink.attach = slowly  # type: ignore[method-assign,assignment]
    ShmLink.attach_at_once = Link.attach_at_once  # type: ignore[method-assign]


def _hang_once_ready(here: nodes.Here) -> None:
    """Let the control thread be busy from the moment on when this end is ready."""
    steps = here.live._live(LLMStatusCode.LLM_FAILED)._builder._steps
    check = steps.check_ok

    def check_and_hang(*args: Any) -> None:
        check(*args)
        steps.check_ok = check  # type: ignore[method-assign]
        time.sleep(2)

    steps.check_ok = check_and_hang  # type: ignore[method-assign,assignment]


def test_a_link_works_at_once_where_the_control_thread_is_busy(
    start_node: Start, free_ports: Ports
) -> None:
    (port,) = free_ports(1)
    server, client = _listening(start_node, 1, port), start_node(2, local_comm_res="")
    client.do(nodes.make, "blocks", "blocks", [8, 100], 4, BlocksCacheKey(2, 0))
    client.do(nodes.fill, "blocks", 2)
    client.do(_attach_slowly)
    server.do(_hang_once_ready)
    assert client.do(nodes.link_clusters, [(1, port)]) == OK
    server.do(nodes.pull_blocks, BlocksCacheKey(2, 0), "blocks", [2], [0])
    assert _block(server, 0) == _expected(2, 2)


def test_two_that_link_with_each_other_at_once(start_node: Start, free_ports: Ports) -> None:
    ports = free_ports(2)
    first, second = (_listening(start_node, i + 1, port) for i, port in enumerate(ports))
    for _ in range(10):
        first.begin(nodes.link_clusters, [(2, ports[1])])
        second.begin(nodes.link_clusters, [(1, ports[0])])
        assert (first.result(), second.result()) == (OK, OK)
        first.do(nodes.pull_blocks, BlocksCacheKey(2, 0), "blocks", [3], [5])
        second.do(nodes.pull_blocks, BlocksCacheKey(1, 0), "blocks", [3], [5])
        first.begin(nodes.unlink_clusters, [(2,)], 30_000, True)
        second.begin(nodes.unlink_clusters, [(1,)], 30_000, True)
        assert (first.result(), second.result()) == (OK, OK)


def test_a_link_that_the_peer_formed_is_ours_too(start_node: Start, free_ports: Ports) -> None:
    ports = free_ports(2)
    first, second = (_listening(start_node, i + 1, port) for i, port in enumerate(ports))
    for _ in range(2):
        assert second.do(nodes.link_clusters, [(1, ports[0])]) == OK
        assert first.do(nodes.link_clusters, [(2, ports[1])]) == OK  # it came a moment later
        assert first.do(nodes.link_clusters, [(2, ports[1])])[0] == "LLM_ALREADY_LINK"
        assert second.do(nodes.link_clusters, [(1, ports[0])])[0] == "LLM_ALREADY_LINK"
        assert first.do(nodes.unlink_clusters, [(2, ports[1])]) == OK
        assert second.do(nodes.unlink_clusters, [(1, ports[0])]) == OK


def test_sixteen_in_one_call_some_absent(start_node: Start, free_ports: Ports) -> None:
    ports = free_ports(16)
    for index in range(0, 16, 2):
        start_node(index + 10, listen_ip_info=f"127.0.0.1:{ports[index]}", pool=1 << 20)
    client = start_node(1)
    result, results = client.do(
        nodes.link_clusters, [(i + 10, port) for i, port in enumerate(ports)], 50_000
    )
    assert results == ["LLM_SUCCESS", "LLM_LINK_FAILED"] * 8
    assert result == "LLM_LINK_FAILED"
    log = client.do(nodes.log_of, "ERROR")
    assert any(f"nobody listens at 127.0.0.1:{ports[1]}" in line for line in log)


def test_a_live_link_is_reported_and_a_stale_half_replaced(
    start_node: Start, free_ports: Ports
) -> None:
    (port,) = free_ports(1)
    server, client = _listening(start_node, 1, port), start_node(2, local_comm_res="")
    assert client.do(nodes.link_clusters, [(1, port)]) == OK
    assert client.do(nodes.link_clusters, [(1, port)])[0] == "LLM_ALREADY_LINK"
    assert client.do(nodes.unlink_clusters, [(1,)], 30_000, True) == OK
    assert client.do(nodes.link_clusters, [(1, port)]) == OK
    client.kill()
    client = start_node(2, local_comm_res="")
    assert client.do(nodes.link_clusters, [(1, port)]) == OK
    server.kill()
    assert client.do(nodes.unlink_clusters, [(1, port)])[0] == "LLM_UNLINK_FAILED"
    assert client.do(nodes.unlink_clusters, [(1,)], 30_000, True) == OK
    assert client.do(nodes.link_clusters, [(1, port)])[0] == "LLM_LINK_FAILED"
    server = _listening(start_node, 1, port)
    assert client.do(nodes.link_clusters, [(1, port)]) == OK


def test_a_broken_link_needs_no_unlink(start_node: Start, free_ports: Ports) -> None:
    (port,) = free_ports(1)
    server, client = _listening(start_node, 1, port), start_node(2, local_comm_res="")
    client.do(nodes.make, "blocks", "blocks", [8, 100], 4)
    assert client.do(nodes.link_clusters, [(1, port)]) == OK
    server.kill()
    server = _listening(start_node, 1, port)
    assert client.do(nodes.link_clusters, [(1, port)]) == OK
    client.do(nodes.pull_blocks, BlocksCacheKey(1, 0), "blocks", [3], [5])


def test_unlinking_what_is_not_linked_is_a_success(start_node: Start, free_ports: Ports) -> None:
    client = start_node(2, local_comm_res="")
    (port,) = free_ports(1)
    assert client.do(nodes.unlink_clusters, [(1, port)]) == OK
    assert client.do(nodes.unlink_clusters, [(1,)], 1000, True) == OK
    assert client.do(nodes.unlink_clusters, [(1,)])[0] == "LLM_PARAM_INVALID"


def test_ends_that_do_not_fit_are_told_why(start_node: Start, free_ports: Ports) -> None:
    (port,) = free_ports(1)
    _listening(start_node, 1, port)
    other_mode = start_node(2)
    assert other_mode.do(nodes.link_clusters, [(1, port)])[0] == "LLM_PARAM_INVALID"
    assert (
        "enable_remote_cache_accessible must be equal" in other_mode.do(nodes.log_of, "ERROR")[-1]
    )
    same_id = start_node(1, local_comm_res="")
    assert same_id.do(nodes.link_clusters, [(1, port)])[0] == "LLM_PARAM_INVALID"
    assert "own cluster id 1" in same_id.do(nodes.log_of, "ERROR")[-1]


def test_a_listener_that_does_not_answer(start_node: Start, free_ports: Ports) -> None:
    (port,) = free_ports(1)
    server, client = _listening(start_node, 1, port), start_node(2, local_comm_res="")
    server.pause()
    began = time.monotonic()
    assert client.do(nodes.link_clusters, [(1, port)], 700)[0] == "LLM_TIMEOUT"
    assert 0.6 < time.monotonic() - began < 30
    server.resume()
    assert client.do(nodes.link_clusters, [(1, port)]) == OK


def test_another_cluster_id_than_expected_is_filed_as_it_is(
    start_node: Start, free_ports: Ports
) -> None:
    (port,) = free_ports(1)
    _listening(start_node, 1, port)
    client = start_node(2, local_comm_res="")
    client.do(nodes.make, "blocks", "blocks", [8, 100], 4)
    assert client.do(nodes.link_clusters, [(9, port)]) == OK
    assert "listens cluster 1" in client.do(nodes.log_of, "WARNING")[-1]
    client.do(nodes.pull_blocks, BlocksCacheKey(1, 0), "blocks", [3], [5])


@pytest.mark.parametrize("address", ["192.0.2.1", "127.0.0.1"])
def test_addresses_that_cannot_be_listened_on(
    start_node: Start, free_ports: Ports, address: str
) -> None:
    (port,) = free_ports(1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        node = start_node()
        with pytest.raises(RemoteError) as error:
            node.do(_init_listening, f"{address}:{port}")
    assert error.value.status == "LLM_FAILED"
    expected = "uses this port" if address == "127.0.0.1" else "no such address"
    assert expected in error.value.text
    node.do(_init_listening, f"127.0.0.1:{port}")


def _init_listening(here: nodes.Here, info: str) -> None:
    nodes.init(here, 1, listen_ip_info=info)


def _listen_address(here: nodes.Here) -> tuple[str, int] | None:
    return here.live.listen_address


def _can_bind(ip: str, port: int) -> bool:
    """Another process may have been given the port by the kernel, for a moment."""
    with socket.socket() as again:
        try:
            again.bind((ip, port))
        except OSError:
            return False
        return True


def test_port_0_is_a_free_one(start_node: Start, free_ports: Ports) -> None:
    first, second = (_listening(start_node, cluster, 0) for cluster in (1, 2))
    (ip, port), (_, other) = first.do(_listen_address), second.do(_listen_address)
    assert ip == "127.0.0.1"
    assert port != other
    client = start_node(3, local_comm_res="")
    assert client.do(_listen_address) is None
    client.do(nodes.make, "blocks", "blocks", [8, 100], 4, BlocksCacheKey(3, 0))
    assert client.do(nodes.link_clusters, [(1, port), (2, other)])[0] == "LLM_SUCCESS"
    client.do(nodes.pull_blocks, BlocksCacheKey(1, 0), "blocks", [3], [5])
    assert _block(client, 5) == _expected(1, 3)
    assert client.do(nodes.unlink_clusters, [(1, port)]) == OK
    first.do(nodes.switch_role, LLMRole.DECODER, 0)
    assert first.do(_listen_address) == (ip, port), "the one that it has stays"
    first.do(nodes.switch_role, LLMRole.DECODER)
    assert first.do(_listen_address) is None
    until(lambda: _can_bind(ip, port), what="it was given back")
    (chosen,) = free_ports(1)
    first.do(nodes.switch_role, LLMRole.DECODER, chosen)
    assert first.do(_listen_address) == (ip, chosen)


def test_switching_the_role_moves_the_listener(start_node: Start, free_ports: Ports) -> None:
    first, second = free_ports(2)
    server, client = _listening(start_node, 1, first), start_node(2, local_comm_res="")
    assert client.do(nodes.link_clusters, [(1, first)]) == OK
    with pytest.raises(RemoteError) as error:
        server.do(nodes.switch_role, LLMRole.DECODER, second)
    assert error.value.status == "LLM_EXIST_LINK"
    assert client.do(nodes.unlink_clusters, [(1, first)]) == OK
    server.do(nodes.switch_role, LLMRole.DECODER, second)
    assert client.do(nodes.link_clusters, [(1, first)])[0] == "LLM_LINK_FAILED"
    assert client.do(nodes.link_clusters, [(1, second)]) == OK
    assert client.do(nodes.unlink_clusters, [(1, second)]) == OK
    server.do(nodes.switch_role, LLMRole.PROMPT)
    assert client.do(nodes.link_clusters, [(1, second)])[0] == "LLM_LINK_FAILED"


def test_the_port_can_be_had_again_after_finalize(start_node: Start, free_ports: Ports) -> None:
    (port,) = free_ports(1)
    server, client = _listening(start_node, 1, port), start_node(2, local_comm_res="")
    server.do(nodes.finalize)
    server.do(_init_listening, f"127.0.0.1:{port}")
    assert client.do(nodes.link_clusters, [(1, port)])[0] == "LLM_PARAM_INVALID"  # other mode


def test_a_domain_and_a_link_by_address_to_one_cluster(
    start_node: Start, free_ports: Ports
) -> None:
    (port,) = free_ports(1)
    server, client = _listening(start_node, 1, port), start_node(2, local_comm_res="")
    client.do(nodes.make, "blocks", "blocks", [8, 100], 4)
    server.begin(nodes.link_and_wait, "both", {1: 0, 2: 1})
    comm_id = client.do(nodes.link_and_wait, "both", {1: 0, 2: 1})
    server.result()
    assert client.do(nodes.link_clusters, [(1, port)]) == OK
    assert client.do(nodes.unlink_clusters, [(1, port)]) == OK
    client.do(nodes.pull_blocks, BlocksCacheKey(1, 0), "blocks", [3], [5])
    assert client.do(nodes.link_clusters, [(1, port)]) == OK
    client.do(nodes.unlink, comm_id)
    client.do(nodes.pull_blocks, BlocksCacheKey(1, 0), "blocks", [3], [6])


# -- peers that a test speaks for ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("cluster", "changes", "reason"),
    [
        (
            2,
            {"backend": "rdma"},
            "cluster 2 uses backend rdma and cluster 1 uses shm: set the same",
        ),
        (2, {"one_sided": True}, "enable_remote_cache_accessible must be equal at both ends"),
        (1, {}, "both engines have cluster id 1"),
    ],
)
def test_who_asks_for_a_link_that_cannot_be_is_told_why(
    engine: Engine, cluster: int, changes: dict[str, Any], reason: str
) -> None:
    peer = engine.raw_peer(cluster=cluster)
    dial = {"kind": "dial", "link": 5, "backend": "shm", "one_sided": False, "seconds": 10}
    assert peer.say({**dial, **changes})
    refused = peer.hear("refused")
    assert isinstance(refused, Refused)
    assert refused.link == 5
    assert reason in refused.reason
    assert "form" not in [message.kind for message in until_synced(peer)]


def test_an_engine_that_ends_begins_no_link(engine: Engine) -> None:
    peer, parts = engine.raw_peer(), engine.api._engine
    assert parts is not None
    parts._call(parts._remove_all)
    for link in range(3):
        dial = {"kind": "dial", "link": link, "backend": "shm", "one_sided": False, "seconds": 10}
        assert peer.say(dial)
    assert "form" not in [message.kind for message in until_synced(peer)]
    assert not parts._clusters.pairs


@pytest.fixture
def linked(engine: Engine) -> RawPeer:
    """A peer of cluster 2 that has asked for a link, which is complete."""
    peer = engine.raw_peer()
    assert peer.say(
        {"kind": "dial", "link": 5, "backend": "shm", "one_sided": False, "seconds": 10}
    )
    form = peer.hear("form")
    assert isinstance(form, Form)
    Sent(peer, GOOD, form.domain)
    assert peer.say({"kind": "ready", "domain": form.domain})
    assert peer.hear("ready") is not None
    until_synced(peer)
    return peer


def test_a_peer_whose_end_nobody_has_handled_yet_cannot_be_told(
    engine: Engine, linked: RawPeer
) -> None:
    """Also where the control thread is in the middle of a turn, and has looked for arrivals before."""
    parts = engine.api._engine
    assert parts is not None
    reactor = parts._reactor
    first, second = _Busy(), _Busy()
    reactor.call(lambda: reactor.later(0.0, first.run), nodes.SECONDS)
    assert first.inside.wait(nodes.SECONDS)
    linked.close()
    found: list[LLMStatusCode] = []
    unlinking = threading.Thread(
        target=lambda: found.append(engine.api.unlink_clusters([nodes.cluster_info(2, 1)])[0])
    )
    unlinking.start()
    until(lambda: bool(reactor._posted))
    reactor.post(second.run)  # the turn does not end before the caller has acted on its answer
    first.go_on.set()
    assert second.inside.wait(nodes.SECONDS)
    until(lambda: bool(reactor._posted))
    second.go_on.set()
    unlinking.join(nodes.SECONDS)
    assert found == [LLMStatusCode.LLM_UNLINK_FAILED]


class _Busy:
    """A call that the control thread is inside of until it may go on."""

    def __init__(self) -> None:
        self.inside, self.go_on = threading.Event(), threading.Event()

    def run(self) -> None:
        self.inside.set()
        self.go_on.wait(nodes.SECONDS)


def test_a_peer_that_does_not_confirm_the_end_of_a_link(engine: Engine, linked: RawPeer) -> None:
    result, _ = engine.api.unlink_clusters([nodes.cluster_info(2, 1)], 200)
    assert result is LLMStatusCode.LLM_TIMEOUT

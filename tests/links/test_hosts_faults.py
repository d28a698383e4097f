"""What goes wrong between hosts: wires, firewalls, ports, dying processes, meddlers on the way."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable

import pytest

from tests import hosts, nodes
from tests.hosts import Network
from tests.nodes import Node, RemoteError

pytestmark = hosts.needed

PAIR = {1: 0, 2: 1}
PORT = 26500
PEER_TIMEOUT = 2
Start = Callable[..., Node]


def _table(net: Network) -> str:
    return hosts.table([host.ipv4 for host in net.hosts[:2]])


def _begin(members: list[Node], table: str) -> list[int]:
    return [node.do(nodes.link, "pair", PAIR, table) for node in members]


def _link(members: list[Node], table: str) -> list[int]:
    ids = _begin(members, table)
    hosts.wait_all(members, ids)
    return ids


def _break(node: Node, comm_id: int, seconds: float) -> str:
    """Wait until a link is broken; why."""
    deadline = time.monotonic() + seconds
    while True:
        why = node.do(nodes.link_error, comm_id)
        if why is not None:
            return str(why)
        assert time.monotonic() < deadline, f"not broken within {seconds} s"
        time.sleep(0.05)


def test_a_cut_wire_is_noticed_and_forgiven(start_on: Start, net: Network) -> None:
    environ = {"DATADIST_PEER_TIMEOUT": str(PEER_TIMEOUT)}
    one, two = start_on(0, 1, environ=environ), start_on(1, 2, environ=environ)
    ids = _link([one, two], _table(net))
    time.sleep(PEER_TIMEOUT * 2)
    assert one.do(nodes.link_error, ids[0]) is None, "an idle link is no dead one"
    net.cut(1)
    began = time.monotonic()
    for node, comm_id in zip((one, two), ids, strict=True):
        assert "no sign of life" in _break(node, comm_id, PEER_TIMEOUT * 1.5 + 20)
    assert time.monotonic() - began >= PEER_TIMEOUT / 2
    for node, comm_id in zip((one, two), ids, strict=True):
        node.do(nodes.unlink, comm_id)
    ids = _begin([one, two], _table(net))
    net.mend(1)
    for node, comm_id in zip((one, two), ids, strict=True):
        node.do(nodes.wait, comm_id)
    hosts.check_pull(one, 1, two)


def test_a_wire_that_is_cut_for_a_moment_costs_nothing(start_on: Start, net: Network) -> None:
    one, two = start_on(0, 1), start_on(1, 2)
    ids = _link([one, two], _table(net))
    net.cut(1)
    one.do(nodes.make, "made meanwhile", "blocks", [8, 64], 4)
    time.sleep(1)
    net.mend(1)
    hosts.check_pull(one, 1, two)
    hosts.check_pull(two, 2, one)
    assert one.do(nodes.link_error, ids[0]) is None


def test_a_killed_peer_is_missed_at_once_and_replaced(start_on: Start, net: Network) -> None:
    one, two = start_on(0, 1), start_on(1, 2)
    ids = _link([one, two], _table(net))
    two.kill()
    assert "cluster 2" in _break(one, ids[0], 20)
    one.do(nodes.unlink, ids[0])
    two = start_on(1, 2)
    _link([one, two], _table(net))
    hosts.check_pull(two, 2, one)


def test_a_killed_rank_0_is_replaced_while_others_wait(start_on: Start, net: Network) -> None:
    one, two = start_on(0, 1), start_on(1, 2)
    (comm_id,) = _begin([two], _table(net))
    one.kill()
    one = start_on(0, 1)
    one.do(nodes.wait, *_begin([one], _table(net)))
    two.do(nodes.wait, comm_id)
    hosts.check_pull(one, 1, two)


def test_a_port_in_use_is_waited_for(start_on: Start, net: Network) -> None:
    blocker, one = Node({}), start_on(0, 1)
    try:
        blocker.do(hosts.enter, net.hosts[0].namespace)
        blocker.do(_listen, net.hosts[0].ipv4)
        two = start_on(1, 2)
        ids = _begin([one, two], _table(net))
        nodes.said(one, "WARNING", "cannot listen at", f"the port is held by pid {blocker.pid}")
        with pytest.raises(RemoteError) as error:
            one.do(nodes.wait, ids[0], 100)
        assert f"cannot listen at {net.hosts[0].ipv4}:{PORT}" in error.value.text
        assert "another process uses this port" in error.value.text
        blocker.kill()
        for node, comm_id in zip((one, two), ids, strict=True):
            node.do(nodes.wait, comm_id)
    finally:
        blocker.close()


def test_a_program_that_is_no_engine_is_named(start_on: Start, net: Network) -> None:
    other, two = Node({}), start_on(1, 2, link_total_time=5)
    try:
        other.do(hosts.enter, net.hosts[0].namespace)
        other.do(_greet, net.hosts[0].ipv4)
        _begin([two], _table(net))
        assert "no datadist engine: it said b'SSH-2.0" in hosts.why(two)
    finally:
        other.close()


def test_an_address_that_is_not_of_rank_0s_host(start_on: Start, net: Network) -> None:
    table = hosts.table(["10.77.0.99", net.hosts[1].ipv4])
    one, two = start_on(0, 1, link_total_time=9), start_on(1, 2, link_total_time=9)
    _begin([one, two], table)
    assert "this host has no such address" in hosts.why(one)
    assert "10.77.0.99:26500: no route to host" in hosts.why(two)


def test_a_firewall_that_drops(start_on: Start, net: Network) -> None:
    one, two = start_on(0, 1, link_total_time=12), start_on(1, 2, link_total_time=10)
    net.hosts[0].run("ip", "route", "add", "blackhole", f"{net.hosts[1].ipv4}/32")
    _begin([one, two], _table(net))
    why = hosts.why(two)
    assert "connecting timed out" in why
    assert "firewall" in why


def test_descriptors_cannot_leave_the_host(start_on: Start, net: Network) -> None:
    one = start_on(0, 1, transfer_backend="netcopy-fds")
    two = start_on(1, 2, transfer_backend="netcopy-fds")
    _begin([one, two], _table(net))
    for why in (hosts.why(one), hosts.why(two)):
        assert "descriptors, which cannot leave the host" in why


def test_strangers_do_not_keep_members_away(start_on: Start, net: Network) -> None:
    one, raw_peer = start_on(0, 1), Node({})
    try:
        ids = _begin([one], _table(net))
        raw_peer.do(hosts.enter, net.hosts[2].namespace)
        raw_peer.do(_connect_repeatedly, net.hosts[0].ipv4)
        two = start_on(1, 2)
        ids += _begin([two], _table(net))
        for node, comm_id in zip((one, two), ids, strict=True):
            node.do(nodes.wait, comm_id)
        hosts.check_pull(one, 1, two)
        nodes.said(one, "WARNING", net.hosts[2].ipv4)
    finally:
        raw_peer.close()


@pytest.mark.parametrize("what", ["flip", "repeat"])
def test_a_meddler_on_the_way_only_costs_connections(
    start_on: Start, net: Network, what: str
) -> None:
    """Rank 1 reaches rank 0 through a third host, which tampers with the first three connections."""
    one, meddler = start_on(0, 1), Node({})
    try:
        meddler.do(hosts.enter, net.hosts[2].namespace)
        meddler.do(_tamper, net.hosts[2].ipv4, net.hosts[0].ipv4, what)
        environ = {"DATADIST_RENDEZVOUS": f"{net.hosts[2].ipv4}:{PORT}"}
        two = start_on(1, 2, environ=environ)
        ids = _begin([one, two], _table(net))
        for node, comm_id in zip((one, two), ids, strict=True):
            node.do(nodes.wait, comm_id)
        hosts.check_pull(one, 1, two)
        hosts.check_pull(two, 2, one)
        assert meddler.do(_tampered) >= 3
        assert any("MAC" in line for node in (one, two) for line in node.do(nodes.log_of))
    finally:
        meddler.close()


# -- functions that run in nodes -----------------------------------------------------------------


def _listen(here: nodes.Here, address: str) -> None:
    here.any["listener"] = socket.create_server((address, PORT))


def _greet(here: nodes.Here, address: str) -> None:
    """Say what an SSH server says to everybody."""
    listener = socket.create_server((address, PORT))

    def serve() -> None:
        while True:
            sock, _ = listener.accept()
            sock.sendall(b"SSH-2.0-OpenSSH_9.9\r\n")
            sock.close()

    threading.Thread(target=serve, daemon=True).start()


def _connect_repeatedly(_here: nodes.Here, address: str) -> None:
    """Keep connecting: silent ones, and ones with nonsense."""
    kept = []

    def run() -> None:
        for number in range(200):
            try:
                sock = socket.create_connection((address, PORT), 1)
                if number % 2:
                    sock.sendall(b"nonsense" * 10)
            except OSError:
                continue
            kept.append(sock)
            time.sleep(0.02)

    threading.Thread(target=run, daemon=True).start()


def _tamper(here: nodes.Here, at: str, target: str, what: str) -> None:
    """Carry connections on to the target; tamper with a frame of each of the first three."""
    listener = socket.create_server((at, PORT))
    here.any["tampered"] = 0

    def carry(source: socket.socket, sink: socket.socket, tamper: bool) -> None:
        carried = 0
        try:
            while data := source.recv(4096):
                after, carried = carried, carried + len(data)
                if tamper and after >= 80:  # the handshake is over
                    tamper, here.any["tampered"] = False, here.any["tampered"] + 1
                    data = data + data if what == "repeat" else _flipped(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            for sock in (source, sink):
                with contextlib.suppress(OSError):  # ends the other direction's recv, too
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()

    def serve() -> None:
        for number in range(1000):
            sock, _ = listener.accept()
            try:
                onward = socket.create_connection((target, PORT), 2)
            except OSError:
                sock.close()
                continue
            bad = here.any["tampered"] < 3
            pairs = [
                (sock, onward, bad and number % 2 == 0),
                (onward, sock, bad and number % 2 == 1),
            ]
            for pair in pairs:
                threading.Thread(target=carry, args=pair, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()


def _flipped(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def _tampered(here: nodes.Here) -> int:
    return int(here.any["tampered"])

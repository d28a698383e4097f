"""The port of a listen address: after a restart, beside another engine, its holder (endpoint.py)."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from datadist.control import endpoint
from datadist.control.endpoint import Endpoint, EndpointError
from datadist.control.hostport import HostPort
from datadist.control.port_holders import describe_holders
from datadist.control.runtime_dir import Address, RuntimeDir
from tests import nodes, ports
from tests.nodes import Node, RemoteError

Start = Callable[..., Node]
LOOPBACK = "127.0.0.1"
ENGINE, OTHER = Address(1, "a" * 32), Address(2, "b" * 32)


@pytest.fixture
def directory(runtime_dir: Path) -> Iterator[RuntimeDir]:
    made = RuntimeDir(runtime_dir)
    yield made
    made.close()


@pytest.fixture
def waiting_port() -> int:
    """A port whose last connection has ended a moment ago: the kernel keeps it (TIME_WAIT)."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        (port,) = ports.free(1)
        listener.bind((LOOPBACK, port))
        listener.listen()
        with socket.create_connection((LOOPBACK, port)) as client:
            listener.accept()[0].close()
            assert client.recv(1) == b""
    with socket.socket() as plain, pytest.raises(OSError, match="Address already in use"):
        plain.bind((LOOPBACK, port))
    return port


def _can_bind(port: int, address: str = LOOPBACK, reuse: bool = True) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        try:
            sock.bind((address, port))
            sock.listen()
        except OSError:
            return False
        return True


@pytest.mark.parametrize("address", [LOOPBACK, "0.0.0.0"])
def test_a_port_whose_connections_have_ended_can_be_taken(
    directory: RuntimeDir, waiting_port: int, address: str
) -> None:
    made = Endpoint(directory, ENGINE, address, waiting_port)
    with pytest.raises(ConnectionRefusedError):  # reserved, not open
        socket.create_connection((LOOPBACK, waiting_port))
    with pytest.raises(EndpointError, match="another process uses this port") as caught:
        Endpoint(directory, OTHER, LOOPBACK, waiting_port)
    assert caught.value.in_use == (LOOPBACK, waiting_port)
    assert not _can_bind(waiting_port)
    assert not _can_bind(waiting_port, "0.0.0.0")
    made.close()
    assert _can_bind(waiting_port)


@pytest.mark.parametrize("first", ["plain", "after others"])
@pytest.mark.parametrize("second", ["plain", "after others"])
def test_two_engines_never_share_a_port(
    free_ports: Callable[[int], list[int]], first: str, second: str
) -> None:
    """Also where both use SO_REUSEADDR, which lets sockets bind beside each other."""
    take = {"plain": endpoint._bound, "after others": endpoint._bound_after_others}
    place = HostPort(LOOPBACK, free_ports(1)[0])
    with take[first](place), pytest.raises(OSError, match="Address already in use"):
        take[second](place)


def test_of_two_that_have_bound_one_gets_the_port(
    free_ports: Callable[[int], list[int]],
) -> None:
    """The other one binds at the worst moment, before the first one listens."""
    place = HostPort(LOOPBACK, free_ports(1)[0])
    with (
        endpoint._bound(place, reuse=True) as early,
        endpoint._bound_after_others(place),
        pytest.raises(OSError, match="Address already in use"),
    ):
        early.listen()


def _init(here: nodes.Here, cluster: int, port: int) -> None:
    nodes.init(here, cluster, listen_ip_info=f"{LOOPBACK}:{port}")


def test_an_engine_starts_again_at_once_and_a_second_one_hears_who_has_the_port(
    start_node: Start, waiting_port: int
) -> None:
    first, second = start_node(), start_node()
    first.do(_init, 1, waiting_port)
    with pytest.raises(RemoteError, match="another process uses this port") as caught:
        second.do(_init, 2, waiting_port)
    assert caught.value.status == "LLM_FAILED"
    _names(caught.value.text, first.pid)
    first.kill()
    second.do(_init, 2, waiting_port)


def _names(text: str, pid: int) -> None:
    """Sockets that are bound and no more are shown by Linux 6.8 and later."""
    if tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= (6, 8):
        assert f"the port is held by pid {pid}" in text
    else:
        assert "held by" not in text


@pytest.mark.parametrize(
    ("family", "address"),
    [(socket.AF_INET, LOOPBACK), (socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")],
)
def test_a_program_that_listens_is_named(family: int, address: str) -> None:
    (port,) = ports.free(1)  # those that the kernel chooses may be others' at other addresses
    with socket.socket(family) as listener:
        listener.bind((address, port))
        listener.listen()
        assert describe_holders(HostPort(LOOPBACK, port)).startswith(f"pid {os.getpid()}, ")
        assert describe_holders(HostPort("0.0.0.0", port)).startswith(f"pid {os.getpid()}, ")
    assert describe_holders(HostPort(LOOPBACK, port)) == ""


def test_a_program_at_an_ipv6_address_is_named() -> None:
    (port,) = ports.free(1)
    with socket.socket(socket.AF_INET6) as listener:
        listener.bind(("::1", port))
        listener.listen()
        for host in ("::1", "::"):
            assert describe_holders(HostPort(host, port)).startswith(f"pid {os.getpid()}, ")
        for host in ("fe80::1", LOOPBACK):
            assert describe_holders(HostPort(host, port)) == ""
        assert describe_holders(HostPort("no.address", port)) == ""


def test_a_connection_that_has_the_port_is_named() -> None:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        listener.listen()
        (port,) = ports.free(1)
        place = listener.getsockname()
        with socket.create_connection(place, source_address=(LOOPBACK, port)):
            assert f"pid {os.getpid()}" in describe_holders(HostPort(LOOPBACK, port))
            assert describe_holders(HostPort("127.0.0.2", port)) == ""


def test_a_process_of_another_user_is_named_by_its_user(start_node: Start) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    (port,) = ports.free(1)
    with socket.socket() as listener:
        listener.bind((LOOPBACK, port))
        listener.listen()
        found = start_node().do(_ask_as_nobody, port)
    assert found == "a process of user 0 that this one cannot see"


def _ask_as_nobody(_here: nodes.Here, port: int) -> str:
    os.setgroups([])
    os.setgid(65_534)
    os.setuid(65_534)
    return describe_holders(HostPort(LOOPBACK, port))

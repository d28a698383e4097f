"""Hosts that the kit makes on one machine: they reach each other, can be cut off, and leave nothing."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from datadist.testing import far_hosts
from datadist.testing.far_hosts import FarHosts, FarHostsError, no_namespaces
from datadist.testing.namespace import enter, make_namespace, on_a_thread
from tests import descriptors

_refusal = no_namespaces()
namespaces_needed = pytest.mark.skipif(_refusal is not None, reason=_refusal or "")
HOLD = """
import sys
from datadist.testing.far_hosts import FarHosts
hosts = FarHosts(2, "namespaces")
print(*(host.namespace for host in hosts.hosts), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def hosts() -> Iterator[FarHosts]:
    made = FarHosts(3, "namespaces")
    yield made
    made.close()


def _connects(hosts: FarHosts, seconds: float) -> bool:
    """Whether rank 0 reaches a socket that rank 1 listens on."""

    def listen() -> socket.socket:
        hosts.host(1).enter()
        return socket.create_server((hosts.host(1).address, 0))

    def dial() -> bool:
        hosts.host(0).enter()
        try:
            socket.create_connection(listener.getsockname(), seconds).close()
        except OSError:
            return False
        return True

    listener = on_a_thread(listen)
    with listener:
        return on_a_thread(dial)


@namespaces_needed
def test_hosts_reach_each_other_and_not_this_one(hosts: FarHosts) -> None:
    assert _connects(hosts, 10)
    with socket.create_server(("127.0.0.1", 0)) as here:

        def dial() -> None:
            hosts.host(0).enter()
            socket.create_connection(here.getsockname(), 10)

        with pytest.raises(ConnectionRefusedError):
            on_a_thread(dial)


@namespaces_needed
def test_a_cable_is_cut_and_mended(hosts: FarHosts) -> None:
    hosts.cut(1)
    assert not _connects(hosts, 0.3)
    hosts.mend(1)
    assert _connects(hosts, 10)


@namespaces_needed
def test_this_process_stays_where_it_is(hosts: FarHosts) -> None:
    before = os.readlink("/proc/self/ns/net")

    def there() -> str:
        hosts.host(0).enter()
        return os.readlink("/proc/thread-self/ns/net")

    assert on_a_thread(there) != before
    assert os.readlink("/proc/thread-self/ns/net") == before


@namespaces_needed
def test_the_devices_have_the_addresses(hosts: FarHosts) -> None:
    def names() -> list[str]:
        hosts.host(0).enter()
        return sorted(name for _, name in socket.if_nameindex())

    assert on_a_thread(names) == ["eth0", "lo"]
    assert hosts.host(0).device == "eth0"
    assert "3 network namespaces, 10.77.0.1 to 10.77.0.3, device eth0" in hosts.describe()


@pytest.mark.parametrize("kind", ["directories", "automatic"])
def test_a_closed_host_leaves_nothing(kind: str) -> None:
    before = descriptors.count()
    made = FarHosts(4, kind)
    folders = [Path(host.directory) for host in made.hosts]
    assert len(set(folders)) == 4
    assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}
    made.close()
    made.close()
    assert not any(folder.exists() for folder in folders)
    assert not any(folder.parent.exists() for folder in folders)
    assert descriptors.falls_to(before)


@namespaces_needed
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_namespaces_end_with_the_process_that_holds_them(
    how: signal.Signals, tmp_path: Path
) -> None:
    """One that is killed removes nothing: the kernel does, also of the cables to other namespaces."""
    program = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    try:
        assert program.stdout is not None
        path = program.stdout.readline().split()[0]
        kept = _veth_into(path)
        try:
            assert _has(kept, "probe")
            program.send_signal(how)
            program.wait(60)
            _wait_for(lambda: not _has(kept, "probe"))
        finally:
            os.close(kept)
    finally:
        program.kill()
        program.communicate()


def _veth_into(path: str) -> int:
    """A namespace of this test with a cable into another one: the kernel removes it with either."""
    made: list[int] = []
    make_namespace(made)
    here = f"/proc/{os.getpid()}/fd/{made[0]}"
    _inside(
        here, "ip", "link", "add", "probe", "type", "veth", "peer", "name", "other", "netns", path
    )
    return made[0]


def _inside(path: str, *command: str) -> str:
    def run() -> str:
        enter(path)
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=30
        ).stdout

    return on_a_thread(run)


def _has(descriptor: int, device: str) -> bool:
    return device in _inside(f"/proc/{os.getpid()}/fd/{descriptor}", "ip", "-brief", "link")


def _wait_for(condition: object) -> None:
    end = time.monotonic() + 60
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "the namespace is still there"
        time.sleep(0.05)


def test_without_namespaces_directories_take_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(far_hosts, "no_namespaces", lambda: "network namespaces need root")
    made = FarHosts(2)
    try:
        assert made.kind == "directories"
        assert (
            "2 runtime directories, all on loopback (network namespaces need root)"
            in made.describe()
        )
        first, second = made.hosts
        assert first.address != second.address
        assert (first.address.partition(".")[0], first.device, first.namespace) == (
            "127",
            "lo",
            None,
        )
    finally:
        made.close()
    with pytest.raises(FarHostsError, match="need root; --far=directories needs no namespaces"):
        FarHosts(2, "namespaces")


def test_without_ip_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert no_namespaces() == "the command ip is not installed (Debian: iproute2)"


def test_a_host_can_be_sent_and_does_not_show_its_key() -> None:
    made = FarHosts(2, "directories")
    try:
        host = made.host(3)
        assert host == made.hosts[1]
        assert pickle.loads(pickle.dumps(host)) == host
        assert host.auth_key not in repr(host)
        assert host.fill("{device}@{address}:{x}") == f"lo@{host.address}:{{x}}"
    finally:
        made.close()

"""The transport on a machine without RDMA: what is said, and that nothing else is disturbed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datadist_rdma import RdmaTransport, ports, transport, verbs

from datadist.rank_table import parse_rank_table
from datadist.transport import LinkError, TransportError, TransportOptions

needs_no_rdma = pytest.mark.skipif(
    Path("/sys/class/infiniband").exists(), reason="this machine has RDMA"
)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """libibverbs is not installed."""
    monkeypatch.setattr(verbs, "LIBRARY", "libibverbs-that-is-not-there.so.1")


@pytest.mark.usefixtures("no_library")
def test_without_the_library() -> None:
    state = RdmaTransport.probe()
    assert not state.usable
    assert "libibverbs1" in state.reason
    with pytest.raises(TransportError, match="cannot be loaded"):
        RdmaTransport(TransportOptions())


class _Devices:
    """A library that knows devices, or none."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def __enter__(self) -> dict[str, int]:
        return dict.fromkeys(self._names, 1)

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("devices", "reasons", "text"),
    [
        ([], [], "there is no RDMA device"),
        (["mlx5_0"], ["mlx5_0 port 1 is 1: DOWN, not ACTIVE"], "mlx5_0 port 1 is 1: DOWN"),
        (["mlx5_0"], [], "mlx5_0 has no port"),
    ],
)
def test_every_kind_of_nothing_has_a_reason(
    monkeypatch: pytest.MonkeyPatch, devices: list[str], reasons: list[str], text: str
) -> None:
    monkeypatch.setattr(verbs, "Library", lambda: None)
    monkeypatch.setattr(transport, "listed", lambda _: _Devices(*devices))
    monkeypatch.setattr(ports, "list_gids", lambda: ([], reasons))
    state = RdmaTransport.probe()
    assert not state.usable
    assert text in state.reason


@needs_no_rdma
def test_the_kernel_without_rdma_is_named_and_auto_takes_another() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "datadist", "backends"],
        capture_output=True, text=True, check=True, env={**os.environ, "DATADIST_BACKEND": "auto"},
    )  # fmt: skip
    (line,) = [line for line in run.stdout.splitlines() if line.split()[:1] == ["rdma"]]
    assert "libibverbs" in line or "ib_uverbs" in line
    assert "auto chooses shm" in run.stdout


def test_importing_loads_no_library() -> None:
    code = (
        "import datadist_rdma, sys; maps = open('/proc/self/maps').read(); "
        "sys.exit('libibverbs' in maps)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- the rank table --------------------------------------------------------------------------------


def _table(device_ip: str | None) -> str:
    device = {"device_id": "0", "rank_id": "0", "device_ip": device_ip}
    return json.dumps(
        {
            "version": "1.0", "status": "completed", "server_count": "1",
            "server_list": [{"server_id": "s", "device": [device]}],
        }
    )  # fmt: skip


@pytest.fixture
def two_adapters(monkeypatch: pytest.MonkeyPatch) -> RdmaTransport:
    """A transport on a host with two adapters, of which none was opened yet."""

    def gid(device: str, address: bytes) -> ports.Gid:
        return ports.Gid(device, 1, 3, bytes(10) + b"\xff\xff" + address, "eth0")

    gids = [gid("mlx5_0", b"\x0a\x00\x00\x01"), gid("mlx5_1", b"\x0a\x00\x01\x01")]
    monkeypatch.setattr(transport, "_usable_gids", lambda: gids)
    monkeypatch.setattr(ports, "is_current", lambda _: True)
    monkeypatch.setattr(verbs, "Library", lambda: None)
    return RdmaTransport(TransportOptions())


@pytest.mark.parametrize("device_ip", [None, "10.0.0.1", "10.0.1.1", "x.x.x.x", "xxxx", "*"])
def test_tables_that_fit(two_adapters: RdmaTransport, device_ip: str | None) -> None:
    two_adapters.check_table(parse_rank_table(_table(device_ip)), 0)


@pytest.mark.parametrize(
    ("device_ip", "text"),
    [
        ("10.0.2.1", "10.0.2.1 (device_ip of rank 0) is no RoCE v2 address of this host"),
        ("roce0", "'roce0' does not appear to be an IPv4 or IPv6 address"),
        ("fd00::1", "there are: 10.0.0.1 (mlx5_0 port 1 GID 3), 10.0.1.1"),
    ],
)
def test_tables_that_do_not_fit(two_adapters: RdmaTransport, device_ip: str, text: str) -> None:
    with pytest.raises(LinkError) as caught:
        two_adapters.check_table(parse_rank_table(_table(device_ip)), 0)
    assert text in str(caught.value)
    assert "rank table, device_ip of rank 0" in str(caught.value)

"""Choosing device, port and GID, over trees like those of the kernel."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest
from datadist_rdma.ports import Gid, GidFilter, NoPort, choose, is_current, list_gids, route_source

V1, V2 = "IB/RoCE v1", "RoCE v2"


def _text(address: str) -> str:
    parsed = ipaddress.ip_address(address)
    raw = parsed.packed if parsed.version == 6 else bytes(10) + b"\xff\xff" + parsed.packed
    digits = raw.hex()
    return ":".join(digits[i : i + 4] for i in range(0, 32, 4))


def _port(
    root: Path, device: str, port: int, entries: list[tuple[str, str]], state: str = "4: ACTIVE"
) -> None:
    """A port; an entry is an address ("" for none) and a type."""
    folder = root / device / "ports" / str(port)
    for name in ("gids", "gid_attrs/types", "gid_attrs/ndevs"):
        (folder / name).mkdir(parents=True)
    (folder / "state").write_text(state + "\n")
    (folder / "link_layer").write_text("Ethernet\n")
    for index, (address, kind) in enumerate(entries):
        (folder / "gids" / str(index)).write_text(_text(address or "::") + "\n")
        if kind:
            (folder / "gid_attrs/types" / str(index)).write_text(kind + "\n")
            (folder / "gid_attrs/ndevs" / str(index)).write_text("eth7\n")


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """Two adapters, one with two ports, listing addresses as adapters do."""
    link_local = "fe80::1"
    _port(
        tmp_path, "mlx5_0", 1,
        [(link_local, V1), (link_local, V2), ("10.0.0.1", V1), ("10.0.0.1", V2), ("", ""),
         ("fd00::1", V1), ("fd00::1", V2)],
    )  # fmt: skip
    _port(tmp_path, "mlx5_1", 1, [(link_local, V2), ("10.0.1.1", V2)])
    _port(tmp_path, "mlx5_1", 2, [(link_local, V2), ("10.0.2.1", V2)], state="1: DOWN")
    return tmp_path


def test_only_roce_v2_of_active_ports_is_listed(adapters: Path) -> None:
    gids, reasons = list_gids(adapters)
    assert [(g.device, g.port, g.index, str(g.address)) for g in gids] == [
        ("mlx5_0", 1, 1, "fe80::1"),
        ("mlx5_0", 1, 3, "10.0.0.1"),
        ("mlx5_0", 1, 6, "fd00::1"),
        ("mlx5_1", 1, 0, "fe80::1"),
        ("mlx5_1", 1, 1, "10.0.1.1"),
    ]
    assert gids[0].interface == "eth7"
    assert reasons == ["mlx5_1 port 2 is 1: DOWN, not ACTIVE"]


def test_large_tables_are_in_numeric_order(tmp_path: Path) -> None:
    _port(tmp_path, "rxe0", 1, [("", "")] * 10 + [("10.0.0.9", V2), ("10.0.0.10", V2)])
    gids, _ = list_gids(tmp_path)
    assert [gid.index for gid in gids] == [10, 11]


def test_the_port_that_is_wished_for_is_taken(tmp_path: Path) -> None:
    for port in (1, 2):
        _port(tmp_path, "mlx5_0", port, [(f"10.0.{port}.1", V2)])
    gids, _ = list_gids(tmp_path)
    for port in (1, 2):
        chosen = choose(gids, GidFilter(port=port), None, "device_ip")
        assert (chosen.port, str(chosen.address)) == (port, f"10.0.{port}.1")
    with pytest.raises(NoPort, match=r"fits the options \(port 3\)"):
        choose(gids, GidFilter(port=3), None, "device_ip")


def test_infiniband_ports_are_no_use(tmp_path: Path) -> None:
    _port(tmp_path, "mlx5_0", 1, [("fe80::1", "")])
    (tmp_path / "mlx5_0/ports/1/link_layer").write_text("InfiniBand\n")
    assert list_gids(tmp_path) == ([], ["mlx5_0 port 1 (InfiniBand) has no RoCE v2 address"])


def test_no_tree_at_all(tmp_path: Path) -> None:
    assert list_gids(tmp_path / "absent") == ([], [])


@pytest.mark.parametrize(
    ("address", "gid_filter", "expected"),
    [
        ("10.0.0.1", GidFilter(), ("mlx5_0", 3)),
        ("fd00::1", GidFilter(), ("mlx5_0", 6)),
        ("10.0.1.1", GidFilter(), ("mlx5_1", 1)),
        (None, GidFilter(), ("mlx5_0", 3)),
        (None, GidFilter(device="mlx5_1"), ("mlx5_1", 1)),
        (None, GidFilter(device="mlx5_1", gid_index=0), ("mlx5_1", 0)),
        ("fe80::1", GidFilter(device="mlx5_1"), ("mlx5_1", 0)),
    ],
)
def test_choice(
    adapters: Path, address: str | None, gid_filter: GidFilter, expected: tuple[str, int]
) -> None:
    gids, _ = list_gids(adapters)
    wanted = None if address is None else ipaddress.ip_address(address)
    chosen = choose(gids, gid_filter, wanted, "device_ip")
    assert (chosen.device, chosen.index) == expected


@pytest.mark.parametrize(
    ("address", "gid_filter", "text"),
    [
        ("10.0.2.1", GidFilter(), "10.0.2.1 (device_ip) is no RoCE v2 address of this host"),
        ("10.0.1.1", GidFilter(device="mlx5_0"), "with device mlx5_0"),
        (None, GidFilter(device="mlx5_9"), "no RoCE v2 address fits the options (device mlx5_9)"),
        (None, GidFilter(gid_index=2), "there are: fe80::1 (mlx5_0 port 1 GID 1), 10.0.0.1"),
    ],
)
def test_what_is_not_there_is_named(
    adapters: Path, address: str | None, gid_filter: GidFilter, text: str
) -> None:
    gids, _ = list_gids(adapters)
    wanted = None if address is None else ipaddress.ip_address(address)
    with pytest.raises(NoPort) as caught:
        choose(gids, gid_filter, wanted, "device_ip")
    assert text in str(caught.value)


def test_entries_that_moved_are_noticed(adapters: Path) -> None:
    gids, _ = list_gids(adapters)
    assert all(is_current(gid, adapters) for gid in gids)
    table = adapters / "mlx5_1/ports/1/gids"
    (table / "1").write_text(_text("10.0.1.2") + "\n")
    (table / "0").unlink()
    gone = [gid.index for gid in gids if not is_current(gid, adapters)]
    assert gone == [0, 1]


def test_addresses_of_gids() -> None:
    gid = Gid("d", 1, 0, bytes(10) + b"\xff\xff\x0a\x00\x00\x01", "eth0")
    assert str(gid.address) == "10.0.0.1"
    assert str(gid) == "10.0.0.1 (d port 1 GID 0)"


@pytest.mark.parametrize(
    ("peer", "source"),
    [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("no address", None), ("", None)],
)
def test_the_source_of_a_route(peer: str, source: str | None) -> None:
    found = route_source(peer)
    assert (None if found is None else str(found)) in (source, None if ":" in peer else source)

"""RDMA devices, their ports, and the addresses (GIDs) that RoCE needs."""

from __future__ import annotations

import ctypes.util
from collections.abc import Iterator
from pathlib import Path

from datadist.diagnosis.finding import Finding, Level, on

CLASS = Path("/sys/class/infiniband")
DEVICES = Path("/dev/infiniband")
NOTHING = "0000:0000:0000:0000:0000:0000:0000:0000"
RDMA = on("rdma")


def examine(devices: Path = CLASS, nodes: Path = DEVICES) -> Iterator[Finding]:
    """Library, device nodes, and one finding per port."""
    library = ctypes.util.find_library("ibverbs")
    if library is None:
        yield Finding("libibverbs", Level.PROBLEM, "not found", "apt-get install libibverbs1", RDMA)
    else:
        yield Finding("libibverbs", Level.OK, library, "", RDMA)
    names = sorted(path.name for path in devices.glob("*"))
    if not names:
        yield Finding(
            "RDMA devices", Level.PROBLEM, "the kernel knows none",
            "load the driver of the card, or rdma_rxe on an Ethernet interface "
            "(rdma link add rxe0 type rxe netdev eth0)", RDMA,
        )  # fmt: skip
        return
    if not list(nodes.glob("uverbs*")):
        yield Finding(
            "RDMA device nodes", Level.PROBLEM, f"no uverbs in {nodes}",
            "modprobe ib_uverbs; in a container pass /dev/infiniband", RDMA,
        )  # fmt: skip
    for name in names:
        for port in sorted((devices / name / "ports").glob("*")):
            yield _port(name, port)


def _port(device: str, port: Path) -> Finding:
    name = f"RDMA port {device}/{port.name}"
    state, layer = _text(port / "state"), _text(port / "link_layer")
    about = f"{layer or 'unknown'}, {state or 'unknown state'}"
    if "ACTIVE" not in state:
        return Finding(
            name, Level.PROBLEM, about, "bring its interface up (ip link set ... up)", RDMA
        )
    gids = dict(_gids(port))
    if layer == "Ethernet" and not any(kind == "RoCE v2" for _, kind in gids.values()):
        return Finding(
            name, Level.PROBLEM, f"{about}, no RoCE v2 GID",
            "give the interface an IP address; RoCE v2 GIDs come from those", RDMA,
        )  # fmt: skip
    listed = ", ".join(f"{i}: {gid} ({kind})" for i, (gid, kind) in gids.items())
    return Finding(name, Level.OK, f"{about}; GIDs {listed}", "", RDMA)


def _gids(port: Path) -> Iterator[tuple[int, tuple[str, str]]]:
    for path in sorted((port / "gids").glob("*"), key=lambda p: int(p.name)):
        gid = _text(path)
        if gid and gid != NOTHING:
            yield int(path.name), (gid, _text(port / "gid_attrs" / "types" / path.name))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # absent, or a GID that is not in use
        return ""

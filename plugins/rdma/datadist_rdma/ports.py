"""Which device, port and GID to use: RoCE v2 entries of the GID tables, as the kernel shows them.

A GID of RoCE v2 is an IP address: IPv4 as ``::ffff:a.b.c.d``. Tables list every address of the network
interface, RoCE v1 and v2 in turns on most adapters, so the place of an address is never assumed.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datadist.base.addresses import Address, parse_address

SYSFS = Path("/sys/class/infiniband")
ROCE_V2 = "RoCE v2"


class NoPort(Exception):
    """No RoCE v2 address matches the options; the text lists the available ones."""


@dataclass(frozen=True, order=True)
class Gid:
    """A RoCE v2 entry of the GID table of an active port."""

    device: str
    port: int
    index: int
    raw: bytes
    """16 bytes."""
    interface: str

    @property
    def address(self) -> Address:
        """The IP address that this entry stands for."""
        return address_of(self.raw)

    def __str__(self) -> str:
        return f"{self.address} ({self.device} port {self.port} GID {self.index})"


def address_of(raw: bytes) -> Address:
    """The IP address that the 16 bytes of a GID stand for."""
    address = ipaddress.IPv6Address(raw)
    return address.ipv4_mapped or address


def parse(text: str) -> Address:
    """An address in the form of GIDs: an IPv4-mapped address is IPv4. Raises ``ValueError``."""
    address = parse_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def list_gids(root: Path = SYSFS) -> tuple[list[Gid], list[str]]:
    """The usable entries in order, and why ports have none."""
    found: list[Gid] = []
    reasons: list[str] = []
    for port in sorted(root.glob("*/ports/*"), key=lambda p: (p.parts[-3], int(p.name))):
        name = f"{port.parts[-3]} port {port.name}"
        state = _read(port / "state")
        if "ACTIVE" not in state:
            reasons.append(f"{name} is {state or 'in an unknown state'}, not ACTIVE")
            continue
        gids = _gids_of(port)
        if not gids:
            layer = _read(port / "link_layer")
            reasons.append(f"{name} ({layer}) has no RoCE v2 address")
        found += gids
    return found, reasons


def is_current(gid: Gid, root: Path = SYSFS) -> bool:
    """Whether an entry is still what it was: tables change with the addresses of interfaces."""
    port = root / gid.device / "ports" / str(gid.port)
    text = _read(port / "gids" / str(gid.index)).replace(":", "")
    return text == gid.raw.hex() and _read(port / "gid_attrs/types" / str(gid.index)) == ROCE_V2


def _gids_of(port: Path) -> list[Gid]:
    found = []
    for index in sorted(map(int, os.listdir(port / "gids"))):
        # Large tables are mostly empty: entries without a value read as zeros or fail to be read.
        text = _read(f"{port}/gids/{index}")
        raw = bytes.fromhex(text.replace(":", "")) if text else b""
        if len(raw) != 16 or not any(raw):
            continue
        if _read(f"{port}/gid_attrs/types/{index}") != ROCE_V2:
            continue
        interface = _read(f"{port}/gid_attrs/ndevs/{index}")
        found.append(Gid(port.parts[-3], int(port.name), index, raw, interface))
    return found


def _read(path: Path | str) -> str:
    """The text of a small file, "" where it cannot be read; tables have up to 1024 of them."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(fd, 4096).decode().strip()
    except OSError:
        return ""
    finally:
        os.close(fd)


@dataclass(frozen=True)
class GidFilter:
    """The user's restrictions of the choice; None means no restriction."""

    device: str | None = None
    port: int | None = None
    gid_index: int | None = None

    def fits(self, gid: Gid) -> bool:
        """Whether an entry may be used."""
        return (
            self.device in (None, gid.device)
            and self.port in (None, gid.port)
            and self.gid_index in (None, gid.index)
        )

    def __str__(self) -> str:
        parts = [f"{name} {value}" for name, value in vars(self).items() if value is not None]
        return ", ".join(parts) or "any device"


def choose(gids: Sequence[Gid], gid_filter: GidFilter, address: Address | None, origin: str) -> Gid:
    """The entry of ``address``; without one, the first that is not link-local.

    ``origin`` says where the address comes from. Raises :class:`NoPort`.
    """
    fitting = [gid for gid in gids if gid_filter.fits(gid)]
    known = ", ".join(map(str, gids)) or "none"
    if not fitting:
        raise NoPort(f"no RoCE v2 address fits the options ({gid_filter}); there are: {known}")
    if address is None:
        return min(fitting, key=lambda gid: (gid.address.is_link_local, gid))
    matching = [gid for gid in fitting if gid.address == address]
    if not matching:
        raise NoPort(
            f"{address} ({origin}) is no RoCE v2 address of this host with {gid_filter}; "
            f"there are: {known}"
        )
    return matching[0]


def route_source(peer: str) -> Address | None:
    """The local address from which ``peer`` is reached; None where there is no route."""
    with contextlib.suppress(OSError, ValueError):
        parse_address(peer)
        info = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)[0]
        with socket.socket(info[0], socket.SOCK_DGRAM) as probe:
            probe.connect(info[4])  # sends nothing
            return ipaddress.ip_address(probe.getsockname()[0].partition("%")[0])
    return None

"""Options of the nixl transport: which network UCX uses, and where this process is asked."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import re
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from datadist.plugin_options import choice, refuse_unknown
from datadist.transport import OptionError, TransportOptions

KNOWN = {
    "device": "network interface of UCX, such as eth0 (default: that of the listen address, else lo)",
    "transports": 'of UCX: "tcp" (default), or "rc,tcp" for hosts with RDMA adapters',
    "cuda": '"1": Placement.DEVICE is memory of CUDA devices; never run on a GPU (default "0": the host)',
}
TCP = "tcp"
TRANSPORTS = (TCP, "rc,tcp")
LOOPBACK = "lo"
SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class Options:
    """The options of the user."""

    device: str
    transports: str
    cuda: bool
    """Whether Placement.DEVICE is memory of CUDA devices; else it is memory of the host."""
    listen: str | None
    """Address to listen on for askers, that of ``listen_ip_info`` or else of the device; None: a Unix
    socket of this network namespace."""


def parse(options: TransportOptions) -> Options:
    """Check and convert. Raises :class:`OptionError`."""
    refuse_unknown("nixl", options.extra, KNOWN)
    listen = _checked(options.listen_address) if options.listen_address else None
    device = options.extra.get("device")
    if device is not None and not re.fullmatch(r"[\w.:@-]{1,64}(,[\w.:@-]{1,64}){0,7}", device):
        raise OptionError(f"option datadist.nixl.device is {device!r}, it must name an interface")
    device = device or (_interface(listen) if listen else LOOPBACK)
    transports = choice(
        "option datadist.nixl.transports",
        options.extra.get("transports", TCP),
        TRANSPORTS,
    )
    if listen is not None and device == LOOPBACK and not ipaddress.ip_address(listen).is_loopback:
        raise OptionError(
            f"option datadist.nixl.device is {LOOPBACK!r}, which nobody reaches from other hosts, but "
            f"LLMConfig.listen_ip_info has {listen}: name that address's interface, or leave it out"
        )
    beyond = device != LOOPBACK or (listen and not ipaddress.ip_address(listen).is_loopback)
    if beyond and options.auth_key is None:
        raise OptionError(
            f"option datadist.nixl.device is {device!r}: beyond loopback the secrets of links need a "
            "protected control plane: set DATADIST_AUTH_KEY"
        )
    listen = listen or _address(device)
    cuda = choice("option datadist.nixl.cuda", options.extra.get("cuda", "0"), ("0", "1")) == "1"
    return Options(device, transports + (",cuda_copy" if cuda else ""), cuda, listen)


def _checked(address: str) -> str:
    try:
        if not ipaddress.ip_address(address).is_unspecified:
            return address
    except ValueError:
        pass
    raise OptionError(
        f"LLMConfig.listen_ip_info has {address!r}: peers are told that address, so it must be one of "
        "this host's"
    )


def _interface(address: str) -> str:
    """The network interface that has an address of this host."""
    wanted = ipaddress.ip_address(address)
    if wanted.is_loopback:
        return LOOPBACK
    for _, name in socket.if_nameindex():
        if wanted in _addresses(name):
            return name
    raise OptionError(
        f"no network interface has the address {address} of LLMConfig.listen_ip_info: name one by the "
        "option datadist.nixl.device"
    )


def _address(device: str) -> str | None:
    """The first address of the interfaces of UCX, but for loopback's."""
    names = [name for name in device.split(",") if name != LOOPBACK]
    return next((str(address) for name in names for address in _addresses(name)), None)


def _addresses(name: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    found: list[ipaddress.IPv4Address | ipaddress.IPv6Address] = []
    request = struct.pack("256s", name.encode()[:15])
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        found.append(ipaddress.IPv4Address(fcntl.ioctl(sock, SIOCGIFADDR, request)[20:24]))
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            fields = line.split()
            if fields[-1] == name:
                found.append(ipaddress.IPv6Address(bytes.fromhex(fields[0])))
    return found

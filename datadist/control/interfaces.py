"""The addresses of this host at which other hosts may reach it."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

_SIOCGIFADDR = 0x8915
_REQUEST = struct.Struct("16s24x")
_GLOBAL_SCOPE = "00"


def addresses() -> list[str]:
    """IPv4 and IPv6 addresses of all interfaces but the loopback and link-local ones."""
    found = [ipaddress.ip_address(text) for text in (*_ipv4(), *_ipv6())]
    return [str(a) for a in found if not (a.is_loopback or a.is_link_local)]


def _ipv4() -> Iterator[str]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(sock, _SIOCGIFADDR, _REQUEST.pack(name.encode()))
            except OSError:  # it has none
                continue
            yield socket.inet_ntoa(answer[20:24])


def _ipv6() -> Iterator[str]:
    try:
        lines = Path("/proc/thread-self/net/if_inet6").read_text().splitlines()
    except OSError:  # a kernel without IPv6
        return
    for line in lines:
        digits, _, _, scope, _, _ = line.split()
        if scope == _GLOBAL_SCOPE:
            yield str(ipaddress.IPv6Address(int(digits, 16)))

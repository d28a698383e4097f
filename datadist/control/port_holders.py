"""Who holds a TCP port of this network namespace, for messages; as far as this user may see it."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from datadist.control.hostport import HostPort
from datadist.control.process import described, program_of

NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY = 4, 20
REQUEST_AND_DUMP = 0x301
DONE, ERROR = 3, 2
TIME_WAIT = 6
ALL_STATES = 0xFFFF & ~(1 << TIME_WAIT)
"""Bit 13 asks for sockets that are bound and nothing else: Linux 6.8 and later show those."""
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBBI HH16s16sI2I".replace(" ", ""))
"""``struct inet_diag_req_v2`` (linux/inet_diag.h)."""
_SOCKET = struct.Struct("=BBBB HH16s16sI2I IIIII".replace(" ", ""))
"""``struct inet_diag_msg``."""
SECONDS = 2.0
MAX_HOLDERS = 3
ANY = {b"\0" * 4, b"\0" * 16}


@dataclass(frozen=True)
class _Held:
    """A socket with the port."""

    source: bytes
    uid: int
    inode: int

    def meets(self, address: bytes) -> bool:
        """Whether it keeps others from the address."""
        mapped = b"\0" * 10 + b"\xff\xff"
        return (
            self.source.removeprefix(mapped) == address.removeprefix(mapped)
            or {self.source, address} & ANY != set()
        )


def describe_holders(place: HostPort) -> str:
    """The processes that hold an address, in words; "" where none can be seen.

    It looks through /proc, which takes milliseconds: not on the reactor.
    """
    try:
        address = ipaddress.ip_address(place.host).packed
    except ValueError:
        return ""
    held: list[_Held] = []
    for family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError, struct.error):
            held += [each for each in _sockets(family, place.port) if each.meets(address)]
    if not held:
        return ""
    pids = _processes({each.inode for each in held})
    known = [described(pid, program_of(pid)) for pid in pids.values()]
    unseen = sorted({each.uid for each in held if each.inode not in pids})
    found = [
        *dict.fromkeys(known),
        *(f"a process of user {uid} that this one cannot see" for uid in unseen),
    ]
    return "; ".join(found[:MAX_HOLDERS])


def _unmapped(address: bytes) -> bytes:
    """An IPv4 address that may be written as an IPv6 one."""
    return address.removeprefix(b"\0" * 10 + b"\xff\xff")


def with_holders(text: str, place: HostPort | None) -> str:
    """A message, and who holds the port where that is known."""
    holders = describe_holders(place) if place is not None else ""
    return f"{text}; the port is held by {holders}" if holders else text


def _sockets(family: int, port: int) -> Iterator[_Held]:
    """TCP sockets of this network namespace with a local port. Raises OSError."""
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG
    ) as ask:
        ask.settimeout(SECONDS)
        request = _REQUEST.pack(
            family, socket.IPPROTO_TCP, 0, 0, ALL_STATES, socket.htons(port), 0, b"", b"", 0,
            0xFFFFFFFF, 0xFFFFFFFF,
        )  # fmt: skip
        size = _HEADER.size + len(request)
        ask.send(_HEADER.pack(size, SOCK_DIAG_BY_FAMILY, REQUEST_AND_DUMP, 1, 0) + request)
        while True:
            for kind, body in _messages(ask.recv(1 << 16)):
                if kind in (DONE, ERROR):
                    return
                fields = _SOCKET.unpack_from(body)
                source = fields[6][: 4 if family == socket.AF_INET else 16]
                if fields[4] == socket.htons(port):
                    yield _Held(source, fields[14], fields[15])


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _HEADER.size:
        size, kind, *_ = _HEADER.unpack_from(data)
        yield kind, data[_HEADER.size : size]
        data = data[max(_HEADER.size, size + 3 & ~3) :]


def _processes(inodes: Iterable[int]) -> dict[int, int]:
    """A process by each socket, of those that this user may look into."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[int, int] = {}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        folder = f"/proc/{pid}/fd"
        with suppress(OSError):
            for name in os.listdir(folder):
                with suppress(OSError):
                    inode = wanted.get(os.readlink(f"{folder}/{name}"))
                    if inode is not None:
                        found.setdefault(inode, int(pid))
    return found

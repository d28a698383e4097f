"""Cutting the connections between two processes: every socket that leads from this one to the other.

A thread does it, so that it can be done while the process is inside a call. It hears of it through a
socket that it shares with the test that started it.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

_CREDENTIALS = struct.Struct("3i")
ESTABLISHED = "01"


def serve(orders: socket.socket) -> None:
    """Cut the connections to each pid that is asked for, and answer with their number, to the end."""
    with closing(orders), suppress(OSError):
        while order := orders.recv(64):
            orders.send(str(cut(int(order))).encode())


def cut(pid: int) -> int:
    """Shut down all sockets of this process that are connected with another one; how many there were."""
    theirs = {(remote, local) for local, remote in _tcp(pid).values()}
    own = _tcp(os.getpid())
    number = 0
    for sock in _sockets():
        with sock:
            inode = os.fstat(sock.fileno()).st_ino
            if own.get(inode) in theirs or (own.get(inode) is None and _peer(sock) == pid):
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                    number += 1
    return number


def _sockets() -> Iterator[socket.socket]:
    """Another descriptor of each socket of this process; the caller closes it."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if stat.S_ISSOCK(os.stat(int(name)).st_mode):
                yield socket.socket(fileno=os.dup(int(name)))


def _peer(sock: socket.socket) -> int | None:
    """The process at the other end of a Unix socket."""
    if sock.family != socket.AF_UNIX:
        return None
    with suppress(OSError):
        data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid: int = _CREDENTIALS.unpack(data)[0]
        return pid
    return None


def _tcp(pid: int) -> dict[int, tuple[str, str]]:
    """The TCP connections of a process by inode: local and remote end, as the kernel writes them."""
    inodes = set(_socket_inodes(pid))
    found = {}
    for name in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == ESTABLISHED and int(fields[9]) in inodes:
                    found[int(fields[9])] = (fields[1], fields[2])
    return found


def _socket_inodes(pid: int) -> Iterator[int]:
    with suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                target = os.readlink(f"/proc/{pid}/fd/{name}")
                if target.startswith("socket:["):
                    yield int(target[8:-1])

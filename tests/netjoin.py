"""A transport for tests whose library brings the ranks together, as HCCL does.

The library here is a Unix socket per rank in the directory that ``NETJOIN_DIRECTORY`` names, which
network namespaces do not keep apart. Bytes are moved as by :mod:`tests.netcopy`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import signal
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path

from datadist.transport import Access, Capabilities, Group, Link, LinkError, Region
from tests.netcopy import NetCopy, NetCopyLink

SLICE = 0.05
_RANK = struct.Struct(">I")


def _die(when: str) -> None:
    if os.environ.get("NETJOIN_DIES") == when:
        os.kill(os.getpid(), signal.SIGKILL)


class NetJoinLink(NetCopyLink):
    """Meets in :meth:`join`, before or after the offers."""

    def __init__(self, group: Group, regions: Sequence[Region], access: Access) -> None:
        super().__init__(group, regions, access)
        self._others = [rank for rank in group.peers if rank != group.rank]
        self._links: dict[int, socket.socket] = {}
        self._closed = False
        self._deadline = group.deadline

    def _path(self, rank: int) -> str:
        name = hashlib.sha1(self._group.name.encode()).hexdigest()[:12]
        return str(Path(os.environ["NETJOIN_DIRECTORY"]) / f"{name}.{rank}")

    def join(self, timeout: float) -> None:
        self._deadline = time.monotonic() + timeout
        own = self._group.rank
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(own))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self._path(own))
            listener.listen()
            listener.settimeout(SLICE)
            for rank in [r for r in self._others if r < own]:
                self._dial(rank)
            while len(self._links) < len(self._others):
                self._check()
                with contextlib.suppress(TimeoutError):
                    sock, _ = listener.accept()
                    sock.settimeout(SLICE)
                    self._links[_RANK.unpack(self._read(sock, _RANK.size))[0]] = sock

    def _dial(self, rank: int) -> None:
        while rank not in self._links:
            self._check()
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(SLICE)
            try:
                sock.connect(self._path(rank))
                sock.sendall(_RANK.pack(self._group.rank))
            except OSError:
                sock.close()
                time.sleep(SLICE)
            else:
                self._links[rank] = sock

    def exchange(self, data: bytes) -> list[bytes]:
        """Swap blobs; ``NETJOIN_DIES`` ends the process ``before`` or ``after`` that."""
        _die("before")
        found = {self._group.rank: data}
        try:
            for sock in self._links.values():
                sock.sendall(_RANK.pack(len(data)) + data)
            for rank, sock in self._links.items():
                (size,) = _RANK.unpack(self._read(sock, _RANK.size))
                found[rank] = self._read(sock, size)
        except OSError as error:
            raise LinkError(f"a rank left: {error}") from error
        _die("after")
        return [found[rank] for rank in sorted(found)]

    def _read(self, sock: socket.socket, size: int) -> bytes:
        data = b""
        while len(data) < size:
            self._check()
            with contextlib.suppress(TimeoutError):
                piece = sock.recv(size - len(data))
                if not piece:
                    raise LinkError("a rank left while they were joining")
                data += piece
        return data

    def _check(self) -> None:
        if self._closed:
            raise LinkError("the link was closed meanwhile")
        if time.monotonic() > self._deadline:
            missing = [rank for rank in self._others if rank not in self._links]
            raise LinkError(f"ranks {missing} did not join in time")

    def close(self) -> frozenset[int]:
        self._closed = True
        for sock in self._links.values():
            sock.close()
        return super().close()


class NetJoin(NetCopy):
    """Self-bootstrapping."""

    @property
    def capabilities(self) -> Capabilities:
        return dataclasses.replace(super().capabilities, self_bootstrapping=True)

    def open(self, group: Group, regions: Sequence[Region], access: Access) -> Link:
        return NetJoinLink(group, regions, access)

"""A peer that the test speaks for: a plain socket to an engine, which says whatever it is told."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import struct
import time
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datadist.control.messages import MAX_FDS, WIRE_VERSION, Message, decode, encode

HEADER = struct.Struct(">I")
SECONDS = 60.0
"""What is waited for comes at once; only a defect takes so long."""
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class RawPeer:
    """Connected to the engine whose socket lies at ``path``; incarnations count up from 0."""

    def __init__(self, path: Path, cluster: int = 2, number: int = 0, hello: bool = True) -> None:
        self.incarnation = f"{number:032x}"
        self.cluster = cluster
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(SECONDS)
        directory = os.open(path.parent, os.O_PATH)  # paths of sockets are short
        try:
            self._connect(f"/proc/self/fd/{directory}/{path.name}")
        except OSError:
            self._sock.close()
            raise
        finally:
            os.close(directory)
        self._inbox = b""
        if hello:
            self.say(
                {
                    "kind": "hello", "wire": WIRE_VERSION, "incarnation": self.incarnation,
                    "cluster_id": cluster,
                }
            )  # fmt: skip

    def _connect(self, path: str) -> None:
        """Connect, waiting while the engine has many to accept."""
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                self._sock.connect(path)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def say(self, message: Message | dict[str, Any], fds: Sequence[int] = ()) -> bool:
        """Send a message; whether the connection still stands."""
        frame = (
            _frame(json.dumps(message).encode()) if isinstance(message, dict) else encode(message)
        )
        return self.send(frame, fds)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> bool:
        """Send bytes; whether the connection still stands."""
        try:
            if fds:
                socket.send_fds(self._sock, [data], list(fds))
            else:
                self._sock.sendall(data)
        except OSError:
            return False
        return True

    def offer(self, token: str, data: dict[str, Any], fds: Sequence[int]) -> bool:
        """Send an offer with descriptors; whether the connection still stands."""
        message = {
            "kind": "offer", "domain": token, "data": b64encode(json.dumps(data).encode()).decode(),
            "fds": len(fds), "regions": [1],
        }  # fmt: skip
        return self.say(message, fds)

    def hear_any(self) -> Message | None:
        """The next message; None when the connection ends first."""
        return self._next()

    def hear(self, kind: str) -> Message | None:
        """The next message of that kind; None when the connection ends first."""
        while (message := self._next()) is not None:
            if message.kind == kind:
                return message
        return None

    def heard(self) -> list[Message]:
        """What has arrived, without waiting."""
        self._sock.setblocking(False)
        with contextlib.suppress(OSError):
            while self._read():
                pass
        self._sock.settimeout(SECONDS)
        found = []
        while (body := self._frame()) is not None:
            found.append(decode(body))
        return found

    def closed(self, timeout: float) -> bool:
        """Whether the engine ends the connection in time."""
        self._sock.settimeout(timeout)
        try:
            while self._read():
                pass
        except TimeoutError:
            return False
        except OSError:
            return True
        return True

    def close(self) -> None:
        """Hang up."""
        self._sock.close()

    def _next(self) -> Message | None:
        body = self.next_body()
        return None if body is None else decode(body)

    def next_body(self) -> bytes | None:
        """What the next frame holds; None at the end."""
        while (body := self._frame()) is None:
            try:
                if not self._read():
                    return None
            except OSError:
                return None
        return body

    def _frame(self) -> bytes | None:
        """The body of the next frame, if all of it is here."""
        if len(self._inbox) < HEADER.size:
            return None
        end = HEADER.size + HEADER.unpack_from(self._inbox)[0]
        if len(self._inbox) < end:
            return None
        body, self._inbox = self._inbox[HEADER.size : end], self._inbox[end:]
        return body

    def _read(self) -> bool:
        data, fds, _, _ = socket.recv_fds(self._sock, 1 << 16, MAX_FDS)
        for fd in fds:
            os.close(fd)
        self._inbox += data
        return bool(data)


def _frame(body: bytes) -> bytes:
    return HEADER.pack(len(body)) + body


def memory(size: int, sealed: bool = True) -> int:
    """A descriptor of shared memory."""
    fd = os.memfd_create("raw_peer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if sealed:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return fd


def socket_of(runtime_dir: Path, cluster: int) -> Path:
    """The socket of the engine of a cluster id."""
    (path,) = runtime_dir.glob(f"{cluster}-*.sock")
    return path


def link(
    raw_peer: RawPeer,
    name: str,
    mapping: dict[int, int],
    table: str,
    offer: dict[str, Any],
    fds: Sequence[int],
) -> str | None:
    """Become a member of a domain that the engine waits for, with that offer; its token."""
    raw_peer.say(
        {
            "kind": "announce", "link": 1, "name": name, "ranks": sorted(mapping.items()),
            "table": table, "backend": "shm", "one_sided": False,
        }
    )  # fmt: skip
    form = raw_peer.hear("form")
    if form is None:
        return None
    token = str(form.domain)  # type: ignore[union-attr]
    raw_peer.offer(token, offer, fds)
    raw_peer.say({"kind": "ready", "domain": token})
    return token

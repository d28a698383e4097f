"""A member that a program speaks for: over the Unix socket of an engine of this host, or over TCP.

It has proved itself and linked by the protocol, as an engine does, and can then say anything.
"""

from __future__ import annotations

import json
import os
import socket
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datadist.control.channel import TAG_SIZE
from datadist.control.hostport import HostPort
from datadist.control.messages import WIRE_VERSION, Message, Welcome, encode
from tests.in_process_engine import BASE, SIZE, offer_of
from tests.raw_peer import HEADER, RawPeer, memory
from tests.tcp_server import prove

CLUSTER = 4
"""Cluster id of the hostile member."""


class Target(NamedTuple):
    """An engine: its runtime directory, or its port of loopback where that is not 0."""

    cluster: int
    directory: str
    port: int

    @property
    def backend(self) -> str:
        """The transport of the link."""
        return "netcopy" if self.port else "shm"


class _Far(RawPeer):
    """The same over TCP: every frame has a seal."""

    def __init__(self, port: int, number: int) -> None:
        self.incarnation, self.cluster = f"{number:032x}", CLUSTER
        self._inbox = b""
        self._sock = socket.create_connection(HostPort("127.0.0.1", port), 5)
        try:
            self._seals = prove(self._sock)
        except BaseException:
            self._sock.close()
            raise
        self.say(
            {
                "kind": "hello", "wire": WIRE_VERSION, "incarnation": self.incarnation,
                "cluster_id": CLUSTER,
            }
        )  # fmt: skip
        self.hear("hello")
        self.say(Welcome())

    def say(self, message: Message | dict[str, Any], fds: Sequence[int] = ()) -> bool:
        if isinstance(message, dict):
            body = json.dumps(message).encode()
            return self.frame(body)
        return self.frame(encode(message)[HEADER.size :])

    def frame(self, body: bytes) -> bool:
        frame = HEADER.pack(len(body)) + body
        return self.send(frame + self._seals.sending.next(frame))

    def _frame(self) -> bytes | None:
        if len(self._inbox) < HEADER.size:
            return None
        end = HEADER.size + HEADER.unpack_from(self._inbox)[0]
        if len(self._inbox) < end + TAG_SIZE:
            return None
        body, self._inbox = self._inbox[HEADER.size : end], self._inbox[end + TAG_SIZE :]
        return body


class Ended(Exception):
    """The engine has ended the connection."""


class Member:
    """Connected to an engine as cluster 4. Raises ``OSError`` where the engine takes no connection."""

    def __init__(self, target: Target, number: int) -> None:
        self.target = target
        self.token = "0" * 32
        self._far: _Far | None = None
        if target.port:
            self._far = _Far(target.port, number)
            self.raw_peer: RawPeer = self._far
        else:
            (path,) = Path(target.directory).glob(f"{target.cluster}-*.sock")
            self.raw_peer = RawPeer(path, CLUSTER, number)
            self.raw_peer.hear("hello")

    def join(self) -> None:
        """Link with the engine; raises :class:`Ended` where it does not want to."""
        self.say({"kind": "dial", "link": 1, "backend": self.target.backend, "one_sided": False,
                  "seconds": 30.0})  # fmt: skip
        form = self.raw_peer.hear("form")
        if form is None:
            raise Ended
        self.token = str(form.domain)  # type: ignore[union-attr]
        self._offer()
        self.say({"kind": "ready", "domain": self.token})

    def _offer(self) -> None:
        if self._far is None:
            fd = memory(SIZE)
            self.raw_peer.offer(self.token, offer_of(), [fd])
            os.close(fd)
            return
        data = json.dumps([os.getpid(), [[BASE, SIZE]], False]).encode()
        self.say({"kind": "offer", "domain": self.token, "data": b64encode(data).decode(),
                  "fds": 0, "regions": [1]})  # fmt: skip

    def say(self, message: Message | dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send a message. Raises :class:`Ended`."""
        if not self.raw_peer.say(message, fds):
            raise Ended

    def body(self, body: bytes) -> None:
        """Send a frame with that body. Raises :class:`Ended`."""
        if self._far is not None:
            sent = self._far.frame(body)
        else:
            sent = self.raw_peer.send(HEADER.pack(len(body)) + body)
        if not sent:
            raise Ended

    def raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes. Raises :class:`Ended`."""
        if not self.raw_peer.send(data, fds):
            raise Ended

    def read(self) -> None:
        """Take what has arrived, so that the engine never waits for us to read."""
        self.raw_peer.heard()

    def close(self) -> None:
        """Hang up."""
        self.raw_peer.close()

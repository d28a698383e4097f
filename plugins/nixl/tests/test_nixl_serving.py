"""The owner's end of a connection, with NIXL replaced."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from typing import Any, cast

import numpy as np
from datadist_nixl import memory
from datadist_nixl.library import Agent
from datadist_nixl.serving import GREETING, Server
from datadist_nixl.side import Side
from datadist_nixl.stream import HEADER, Stream
from datadist_nixl.wire import GREETING_BYTES, Kind, hello, pack_metadata, pack_request

from datadist.transport import Access

SIZE = 1 << 20


class Writer:
    """Ends a write at once, but says so only when it is asked; notes what the asker has then heard."""

    def __init__(self, asker: socket.socket) -> None:
        self._asker = asker
        self.heard: list[bytes] = []

    def load(self, metadata: bytes) -> str:
        return metadata.decode()

    def register(self, regions: object) -> None:
        pass

    def prepare(self, *_: object) -> object:
        return object()

    def begin(self, handle: object) -> bool:
        try:
            self.heard.append(self._asker.recv(1 << 10))
        except BlockingIOError:
            self.heard.append(b"")
        return False

    def progress(self) -> None:
        pass

    def ended(self, handle: object) -> bool:
        return True

    def release(self, handle: object) -> None:
        pass

    def close(self) -> None:
        pass


def test_a_large_piece_is_answered_before_the_next_one_is_begun() -> None:
    """To begin one takes as long as to send it: the asker would ask for more too late."""
    with ExitStack() as stack:
        here, there = socket.socketpair()
        stack.callback(there.close)
        there.setblocking(False)
        side, writer = Side(1, [memory.allocate(SIZE)], Access.READ), Writer(there)
        sides = {side.secret: side}
        server = Server(Stream(here, GREETING), bytes, sides, lambda: cast(Agent, writer))
        stack.callback(server.close)

        def send(kind: Kind, number: int, body: bytes) -> None:
            there.sendall(HEADER.pack(len(body), kind, number) + body)

        address = side.ours.values[0].address
        vectors: Any = [np.array([each]) for each in (address, 1 << 20, SIZE)]
        send(Kind.HELLO, 0, hello(b"g" * GREETING_BYTES))
        send(Kind.MEMORY, 0, pack_metadata(1, b"asker"))
        for number in (1, 2, 3):
            send(Kind.READ, number, pack_request(side.secret, "DRAM", 0, vectors))
        for _ in range(5):
            server.serve()
        assert writer.heard == [b"", HEADER.pack(0, Kind.DONE, 1), HEADER.pack(0, Kind.DONE, 2)]

"""A TCP stream between two processes: what the kernel moves from memory of the one to the other's."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress

import numpy as np

SECONDS = 300.0
MOST_BYTES = 256 << 20
"""Memory at each end; more bytes are moved from and to it again."""
PIECE = 1 << 20
ORDER = struct.Struct("!QB")
"""Bytes, and whether the end that was asked sends them."""
SECRET_BYTES = 16
DONE = b"."


class Stream:
    """A connection, and the memory whose bytes it moves. Raises ``OSError``."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self._memory = memoryview(b"")

    def give(self, nbytes: int) -> None:
        """Send so many bytes."""
        for piece in self._pieces(nbytes):
            self.connection.sendall(piece)

    def take(self, nbytes: int) -> None:
        """Receive as many."""
        for piece in self._pieces(nbytes):
            self._fill(piece)

    def receive(self, count: int) -> bytes:
        """A short message; empty at the end of the connection."""
        message = bytearray(count)
        try:
            self._fill(memoryview(message))
        except ConnectionError:
            return b""
        return bytes(message)

    def _fill(self, piece: memoryview) -> None:
        while piece:
            came = self.connection.recv_into(piece)
            if came == 0:
                raise ConnectionError("the other end has closed it")
            piece = piece[came:]

    def _pieces(self, nbytes: int) -> Iterator[memoryview]:
        size = min(nbytes, MOST_BYTES)
        if len(self._memory) < size:
            self._memory = memoryview(np.ones(size, np.uint8)).cast("B")
        for at in range(0, nbytes, PIECE):
            begin = at % MOST_BYTES
            yield self._memory[begin : begin + min(PIECE, nbytes - at)]


class StreamServer:
    """The end that is asked: serves one connection, which begins with ``secret``, until that ends."""

    def __init__(self, address: str, secret: bytes) -> None:
        self._secret = secret
        self._listener = socket.create_server((address, 0))
        self._listener.settimeout(SECONDS)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):  # the other end says why
            with self._listener:
                connection, _ = self._listener.accept()
            with connection:
                stream = Stream(connection)
                if stream.receive(SECRET_BYTES) == self._secret:
                    self._obey(stream)

    @staticmethod
    def _obey(stream: Stream) -> None:
        while order := stream.receive(ORDER.size):
            nbytes, sends = ORDER.unpack(order)
            if sends:
                stream.give(nbytes)
            else:
                stream.take(nbytes)
                stream.connection.sendall(DONE)

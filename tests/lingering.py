"""A descriptor whose close blocks."""

from __future__ import annotations

import socket
import struct

HANGS = 20
"""Seconds for which closing it blocks, unless it is freed."""


class Lingering:
    """A TCP connection with unsent data: closing its last descriptor blocks until the peer reads."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            self._sock = socket.create_connection(server.getsockname())
            self._peer = server.accept()[0]
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, HANGS))
        self._sock.setblocking(False)
        try:
            while True:
                self._sock.send(bytes(1 << 16))
        except BlockingIOError:
            self.fd = self._sock.fileno()

    def take(self) -> int:
        """The last descriptor of it, which the caller owns."""
        return self._sock.detach()

    def send(self, sock: socket.socket, many: int = 1) -> None:
        """Leave it in the queue of a socket only."""
        socket.send_fds(sock, [b'\0\0\0\x0f{"kind":"idle"}'], [self.fd] * many)
        self._sock.close()  # which is not the last one

    def give_up(self) -> None:
        """Close ours, once it was sent and while it is not closed there."""
        self._sock.close()

    def free(self) -> None:
        """Let whoever closes it go on."""
        if self._peer.fileno() < 0:
            return
        self._peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._peer.close()

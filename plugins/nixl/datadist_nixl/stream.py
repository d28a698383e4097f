"""Frames over a stream socket that never blocks: a header, then a body of bounded size.

A signal handler may raise between any two steps of a caller. What the kernel took or gave is
recorded in the same step: C code calls the socket and stores the result (``map`` of its method).
"""

from __future__ import annotations

import socket
import struct
import time
from collections import deque
from collections.abc import Iterator

HEADER = struct.Struct("<IBxxxQ")
"""Bytes of the body, kind, number."""
CHUNK = (256 << 10,)
TURN_SECONDS = 0.01
"""So long one call takes frames; what is left waits until others had their turn."""


class Ended(Exception):
    """The connection has ended; the text says why."""

    def __init__(self, text: str, by_peer: bool = False) -> None:
        super().__init__(text)
        self.by_peer = by_peer
        """Whether the peer has closed it, or its process has ended."""


class Stream:
    """One end of a connection."""

    def __init__(self, sock: socket.socket, most: int) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.most = most
        """Most bytes of a body that is received."""
        self._recv, self._send = sock.recv, sock.send
        self._queue: deque[bytes] = deque()
        self._sent: tuple[bytes, deque[int]] = (b"", deque())
        """The frame that is being sent, and how many bytes of it each call sent."""
        self._received = bytearray()

    def put(self, kind: int, number: int, body: bytes = b"") -> None:
        """Queue a frame; :meth:`flush` sends it."""
        self._queue.append(HEADER.pack(len(body), kind, number) + body)

    @property
    def unsent(self) -> int:
        """Frames that the socket did not take yet."""
        return len(self._queue)

    def flush(self) -> None:
        """Send what the socket takes. Raises :class:`Ended`."""
        queue = self._queue
        while queue:
            frame = queue[0]
            if self._sent[0] is not frame:
                self._sent = (frame, deque())
            counts = self._sent[1]
            done = sum(counts)
            if done == len(frame):
                del queue[0]
                continue
            rest = memoryview(frame)[done:] if done else frame
            try:
                counts.extend(map(self._send, (rest,)))
            except BlockingIOError:
                return
            except OSError as error:
                raise _broken(error) from None

    @property
    def waiting(self) -> bool:
        """Whether a whole frame has arrived that was not taken. Raises :class:`Ended`."""
        return len(self._received) >= HEADER.size + self._body_size()

    def _body_size(self) -> int:
        """Bytes of the body of the first frame; 0 while its header is not here."""
        if len(self._received) < HEADER.size:
            return 0
        size: int = HEADER.unpack_from(self._received)[0]
        if size > self.most:
            raise Ended(f"a message has {size} bytes, at most {self.most} are possible")
        return size

    def frames(self) -> Iterator[tuple[int, int, memoryview]]:
        """Kind, number and body of what has arrived; a frame is gone once the next one is asked for.

        Raises :class:`Ended`, also where a frame is larger than is possible.
        """
        if not self.waiting:
            self._receive()
        data, until = self._received, time.monotonic() + TURN_SECONDS
        while self.waiting:
            size, kind, number = HEADER.unpack_from(data)
            end = HEADER.size + size
            yield kind, number, memoryview(data[HEADER.size : end])
            del data[:end]
            if time.monotonic() > until:
                return

    def _receive(self) -> None:
        data, before = self._received, len(self._received)
        try:
            deque(map(data.__iadd__, map(self._recv, CHUNK)), 0)
        except BlockingIOError:
            return
        except OSError as error:
            raise _broken(error) from None
        if len(data) == before:
            raise Ended("the peer has closed the connection", by_peer=True)

    def close(self) -> None:
        """Give the socket back."""
        self.socket.close()


def _broken(error: OSError) -> Ended:
    by_peer = isinstance(error, (BrokenPipeError, ConnectionResetError, ConnectionRefusedError))
    return Ended(f"the connection is broken: {error.strerror}", by_peer)

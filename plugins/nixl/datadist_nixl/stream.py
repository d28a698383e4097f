"""Frames over a stream socket that never blocks: a header, then a body of bounded size.

A signal handler may raise between any two steps of a caller. What the kernel took or gave is
recorded in the same step: C code calls the socket and stores the result (``deque.extend(map(...))``).
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Iterator

HEADER = struct.Struct("<IBxxxQ")
"""Bytes of the body, kind, number."""
CHUNK = (256 << 10,)


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
        self._received: tuple[deque[bytes], int] = (deque(), 0)
        """Chunks, and how many bytes of them were used."""

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

    def frames(self) -> Iterator[tuple[int, int, memoryview]]:
        """Kind, number and body of what has arrived; a frame is gone once the next one is asked for.

        Raises :class:`Ended`, also where a frame is larger than is possible.
        """
        chunks, at = self._received
        try:
            chunks.extend(map(self._recv, CHUNK))
        except BlockingIOError:
            if not chunks:
                return
        except OSError as error:
            raise _broken(error) from None
        if not chunks[-1]:
            raise Ended("the peer has closed the connection", by_peer=True)
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        view = memoryview(data)
        while len(data) - at >= HEADER.size:
            size, kind, number = HEADER.unpack_from(data, at)
            if size > self.most:
                raise Ended(f"a message has {size} bytes, at most {self.most} are possible")
            begin, end = at + HEADER.size, at + HEADER.size + size
            if end > len(data):
                break
            yield kind, number, view[begin:end]
            at = end
            self._received = (chunks, at)
        if at == len(data):
            self._received = (deque(), 0)
        elif at:
            self._received = (deque((data[at:],)), 0)

    def close(self) -> None:
        """Give the socket back."""
        self.socket.close()


def _broken(error: OSError) -> Ended:
    by_peer = isinstance(error, (BrokenPipeError, ConnectionResetError, ConnectionRefusedError))
    return Ended(f"the connection is broken: {error.strerror}", by_peer)

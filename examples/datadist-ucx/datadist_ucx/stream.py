"""Bytes and memory in pieces over one endpoint, in the order in which they were sent."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from datadist_ucx.loop import Loop

PIECE = 1 << 20
WINDOW = 4
"""Pieces under way at a time."""

Segment = tuple[int, int]
"""Address and bytes."""


class Stream:
    """One direction of requests between two ranks: what it sends and receives has its own tags."""

    def __init__(
        self, loop: Loop, endpoint: Any, out: int, into: int, ended: Callable[[], str | None]
    ) -> None:
        self._loop = loop
        self._endpoint = endpoint
        self._out = out
        self._into = into
        self._ended = ended
        self.deadline: float | None = None
        """``time.monotonic()`` by which waits end; None: when the peer or the link ends."""

    def _wait(self, request: Any) -> None:
        self._loop.wait(request, self._endpoint, self.deadline, self._ended)

    def send(self, data: bytes) -> None:
        """Send one message. Raises ``TimeoutError`` and ``Ended``, as all methods here."""
        self._wait(self._loop.send(self._endpoint, data, self._out))

    def receive(self, size: int) -> bytes:
        """The next message, of ``size`` bytes."""
        buffer = bytearray(size)
        self._wait(self._loop.receive(buffer, self._into))
        return bytes(buffer)

    def send_memory(self, segments: Iterable[Segment]) -> None:
        """What lies in these segments."""
        requests: deque[Any] = deque()
        for piece in _pieces(segments):
            data = b"".join(ctypes.string_at(address, size) for address, size in piece)
            requests.append(self._loop.send(self._endpoint, data, self._out))
            if len(requests) == WINDOW:
                self._wait(requests.popleft())
        while requests:
            self._wait(requests.popleft())

    def receive_memory(self, segments: Iterable[Segment]) -> None:
        """Fill these segments; nothing touches them after this call."""
        waiting: deque[tuple[Any, bytearray, list[Segment]]] = deque()
        pieces = _pieces(segments)
        while True:
            while len(waiting) < WINDOW and (piece := next(pieces, None)) is not None:
                buffer = bytearray(sum(size for _, size in piece))
                waiting.append((self._loop.receive(buffer, self._into), buffer, piece))
            if not waiting:
                return
            request, buffer, piece = waiting.popleft()
            self._wait(request)
            _scatter(buffer, piece)


def _scatter(buffer: bytearray, segments: list[Segment]) -> None:
    source = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    for address, size in segments:
        ctypes.memmove(address, source, size)
        source += size


def _pieces(segments: Iterable[Segment]) -> Iterator[list[Segment]]:
    """The same bytes in lists of PIECE bytes, the last one shorter; so both ends cut alike."""
    piece: list[Segment] = []
    room = PIECE
    for begin, size in segments:
        address, left = begin, size
        while left:
            take = min(left, room)
            piece.append((address, take))
            address, left, room = address + take, left - take, room - take
            if not room:
                yield piece
                piece, room = [], PIECE
    if piece:
        yield piece

"""The owner's end of a connection: it checks what an asker wants, and lets NIXL write.

All of it runs on the thread of :class:`~datadist_nixl.service.Service`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from datadist_nixl.library import Agent, NixlError
from datadist_nixl.memory import NixlRegion, Outside, Vector
from datadist_nixl.side import Side
from datadist_nixl.stream import Ended, Stream
from datadist_nixl.wire import (
    HELLO_BYTES,
    MAX_METADATA,
    Refusal,
    Request,
    WireError,
    pack_metadata,
    pack_refusal,
    parse_hello,
    parse_metadata,
    parse_request,
)
from datadist_nixl.wire import Kind as Message

log = logging.getLogger("datadist.nixl")

MAX_UNDER_WAY = 1024
"""Requests of one asker that are served at a time; more end the connection."""
MAX_UNSENT = 4096
"""Answers that an asker may leave unread."""
MAX_PREPARED, MAX_KEY, SMALL = 64, 256, 256 << 10
"""Handles that are kept for the next request of the same body, most bytes of that, and of the data."""


class Server:
    """Serves one asker."""

    def __init__(
        self, stream: Stream, greet: Callable[[bytes], bytes], sides: Mapping[bytes, Side],
        make_agent: Callable[[], Agent],
    ) -> None:  # fmt: skip
        self._stream = stream
        self._greet = greet
        """Returns whose greeting it is, or raises :class:`WireError`."""
        self._sides = sides
        self._make_agent = make_agent
        self.peer = b""
        """The process that asks, by its greeting."""
        self._writer: Agent | None = None
        """Writes to the asker."""
        self._their_generation = -1
        self._their_name = ""
        self._under_way: dict[int, tuple[Side, Any, bytes]] = {}
        """Reads of the asker that NIXL is writing: side, handle, and the request, by number."""
        self._prepared: dict[bytes, tuple[Side, Any]] = {}
        """Writes that have ended, by the body of their request: the same one is often asked again."""
        self._target: Agent | None = None
        """The asker writes through it."""
        self._generation = 0
        self._allowed: dict[int, Side] = {}
        """Writes of the asker."""
        self.begun = self.last = time.monotonic()
        """When it was made, and when something has happened last."""
        self.watched = False
        """Whether the service waits until the socket takes more."""

    def fileno(self) -> int:
        """The socket's."""
        return self._stream.socket.fileno()

    @property
    def greeted(self) -> bool:
        """Whether the asker has shown that it has an offer."""
        return bool(self.peer)

    @property
    def busy(self) -> bool:
        """Whether there is something to do without an event: for NIXL, or messages that have arrived."""
        return bool(self._under_way or self._allowed or self._stream.waiting)

    @property
    def unsent(self) -> bool:
        """Whether the socket does not take more answers for now."""
        return bool(self._stream.unsent)

    @property
    def brief(self) -> bool:
        """Whether what NIXL has to do takes no time worth speaking of."""
        return not self._allowed and all(key for _, _, key in self._under_way.values())

    def serve(self) -> bool:
        """Take what has arrived, send what the socket takes; always True. Raises :class:`Ended`."""
        try:
            for kind, number, body in self._stream.frames():
                self._take(kind, number, body)
            self._stream.flush()
            if self._stream.unsent > MAX_UNSENT:
                raise WireError("it does not take its answers")
        except WireError as error:
            raise Ended(f"it breaks the protocol: {error}") from None
        return True

    def advance(self) -> bool:
        """Let NIXL work; whether something has ended. Raises :class:`Ended`."""
        moved = False
        try:
            if self._under_way:
                moved = self._look()
        except NixlError as error:
            self._give_up_writer(str(error))
            moved = True
        if self._allowed and self._target is not None:
            self._target.progress()
        if self._stream.waiting:
            self.serve()
            moved = True
        self._stream.flush()
        return moved

    # -- messages --------------------------------------------------------------------------------

    def _take(self, kind: int, number: int, body: memoryview) -> None:
        if not self.peer:
            if kind != Message.HELLO:
                raise WireError("it does not begin with the greeting of an offer")
            self.peer = self._greet(parse_hello(body))
            self._stream.most = MAX_METADATA
        elif kind == Message.READ:
            self._read(number, body)
        elif kind == Message.WRITE:
            self._allow(number, parse_request(body, 2))
        elif kind == Message.WRITTEN:
            self._forget(number)
        elif kind == Message.MEMORY:
            self._learn(*parse_metadata(body))
        elif kind == Message.FENCE:
            self._give_up_target()
            self._stream.put(Message.FENCED, number)
        else:
            raise WireError(f"a message has kind {kind}")

    def _learn(self, generation: int, metadata: bytes) -> None:
        """The asker's memory; a new generation is another agent of NIXL, which needs a new one here."""
        try:
            if generation != self._their_generation:
                self._give_up_writer("the asker has given up its end")
                self._their_generation = generation
            if self._writer is None:
                self._writer = self._make_agent()
                self._their_name = ""
            name = self._writer.load(metadata)
        except NixlError as error:
            self._give_up_writer(str(error))
            return
        if self._their_name not in ("", name):
            raise WireError(f"generation {generation} of its memory names a second agent")
        self._their_name = name

    def _read(self, number: int, body: memoryview) -> None:
        if len(self._under_way) >= MAX_UNDER_WAY or number in self._under_way:
            raise WireError(f"request {number} is one too many")
        key = bytes(body) if len(body) <= MAX_KEY else b""
        try:
            found = self._take_prepared(key)
            if found is None:
                request = parse_request(body, 3)
                if int(request.length.sum()) > SMALL:
                    key = b""
                found = self._prepare(number, request)
            if found is not None and self._writer is not None:
                side, handle = found
                self._under_way[number] = (side, handle, key)
                if self._writer.begin(handle):
                    self._finish(number)
                elif not key:
                    self._answer_early()
        except NixlError as error:
            if number not in self._under_way:
                self._refuse(number, Refusal.FAILED, str(error))
            self._give_up_writer(str(error))

    def _answer_early(self) -> None:
        """Answer reads that have ended, before more are begun.

        NIXL sends most of a paged write as it begins that, which takes milliseconds. The asker has to ask
        for its next piece meanwhile: else there is nothing to send when the window is through.
        """
        if self._look():
            self._stream.flush()

    def _take_prepared(self, key: bytes) -> tuple[Side, Any] | None:
        found = self._prepared.get(key)
        if found is None or found[0].ended is not None:
            return None
        del self._prepared[key]
        return found

    def _prepare(self, number: int, request: Request) -> tuple[Side, Any] | None:
        """The side of a request and a handle; None where the request was refused."""
        found = self._check(number, request, write=False)
        if found is None:
            return None
        side, regions = found
        kind, writer = regions[0].kind, self._writer
        if writer is None:
            raise NixlError("the asker's memory is not known here")
        writer.register(regions)
        handle = writer.prepare(
            self._their_name, rows(request.here, request.length, kind[1]), kind[0],
            rows(request.there, request.length, request.device), request.memory,
        )  # fmt: skip
        return side, handle

    def _finish(self, number: int) -> None:
        """Every byte is in place; the handle is kept for the next such request."""
        side, handle, key = self._under_way.pop(number)
        self._stream.put(Message.DONE, number)
        if key and side.ended is None and key not in self._prepared:
            self._prepared[key] = (side, handle)
            if len(self._prepared) <= MAX_PREPARED:
                return
            _, handle = self._prepared.pop(next(iter(self._prepared)))
        assert self._writer is not None
        self._writer.release(handle)

    def _forget_prepared(self) -> None:
        prepared, self._prepared = self._prepared, {}
        for _, handle in prepared.values():
            if self._writer is not None:
                self._writer.release(handle)

    def _allow(self, number: int, request: Request) -> None:
        """Let the asker write."""
        if len(self._allowed) >= MAX_UNDER_WAY or number in self._allowed:
            raise WireError(f"request {number} is one too many")
        found = self._check(number, request, write=True)
        if found is None:
            return
        side, regions = found
        try:
            if self._target is None:
                self._generation += 1
                self._target = self._make_agent()
            for metadata in self._target.register(regions):
                self._stream.put(Message.TARGET, 0, pack_metadata(self._generation, metadata))
        except NixlError as error:
            self._refuse(number, Refusal.FAILED, str(error))
            return
        side.writers.add((self, number))
        self._allowed[number] = side
        self._stream.put(Message.GO, number)

    def _check(
        self, number: int, request: Request, write: bool
    ) -> tuple[Side, list[NixlRegion]] | None:
        """The side of a request, and its memory of one kind; None where it was refused."""
        side = self._sides.get(request.secret)
        if side is None or side.ended is not None:
            self._refuse(number, Refusal.CLOSED, "the owner has closed the link")
            return None
        if write and not side.writable:
            self._refuse(number, Refusal.FORBIDDEN, "the owner granted read access only")
            return None
        try:
            regions = _regions(side, request)
        except Outside as error:
            place, size = request.here[error.index], request.length[error.index]
            text = f"{size} bytes at {place:#x} are not memory that the owner offered"
            self._refuse(number, Refusal.OUTSIDE, text)
            return None
        if any(region.kind != regions[0].kind for region in regions):
            raise WireError("a request is for several kinds of memory")
        return side, regions

    def _refuse(self, number: int, refusal: Refusal, text: str) -> None:
        self._stream.put(Message.REFUSED, number, pack_refusal(refusal, text))

    def _look(self) -> bool:
        """Answer reads that have ended."""
        writer, moved = self._writer, False
        assert writer is not None
        writer.progress()  # sends as much as it can; `ended` sends once
        for number, (_, handle, _) in list(self._under_way.items()):
            if writer.ended(handle):
                self._finish(number)
                moved = True
        return moved

    # -- the end ---------------------------------------------------------------------------------

    def _forget(self, number: int) -> None:
        side = self._allowed.pop(number, None)
        if side is not None:
            side.writers.discard((self, number))

    def _give_up_writer(self, reason: str) -> None:
        """End all writes to the asker, which asks again for what it still wants."""
        under_way, self._under_way = self._under_way, {}
        writer, self._writer = self._writer, None
        self._prepared = {}  # the agent releases them
        if writer is not None:
            writer.close()
        for number in under_way:
            self._refuse(number, Refusal.FAILED, reason)

    def _give_up_target(self) -> None:
        """End all writes of the asker: what it sends from now on has nowhere to go."""
        target, self._target = self._target, None
        if target is not None:
            target.close()
        for number in list(self._allowed):
            self._forget(number)

    def moves(self, sides: frozenset[Side]) -> bool:
        """Whether memory of a side is being written to the asker."""
        return any(side in sides for side, _, _ in self._under_way.values())

    def end_sides(self, sides: frozenset[Side]) -> None:
        """Sides have ended: nothing that the asker wanted of them touches memory afterwards."""
        self._forget_prepared()
        if self.moves(sides):
            self._give_up_writer("the owner has closed a link")
        if not sides.isdisjoint(self._allowed.values()):
            self._give_up_target()
        self._stream.flush()

    def deregister(self, region: NixlRegion) -> None:
        """A region is about to be released; no link uses it."""
        self._forget_prepared()
        for agent in (self._writer, self._target):
            if agent is not None:
                try:
                    agent.deregister(region)
                except NixlError as error:
                    log.warning("memory stays registered with NIXL: %s", error)

    def close(self) -> None:
        """End everything; the asker sees the end of the connection when it has."""
        self._give_up_writer("")
        self._give_up_target()
        self._stream.close()


GREETING = HELLO_BYTES
"""Most bytes of the first body."""


def rows(address: Vector, length: Vector, device: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Descriptors of NIXL."""
    table = np.empty((len(address), 3), np.uint64)
    table[:, 0] = address
    table[:, 1] = length
    table[:, 2] = device
    return table


def _regions(side: Side, request: Request) -> list[NixlRegion]:
    """Those of ours that a request is for. Raises :class:`Outside`."""
    if len(request.here) == 1:
        return [side.ours.find(int(request.here[0]), int(request.length[0]))]
    return side.ours.some(side.ours.places(request.here, request.length))

"""What an asker has under way with one owner, and the agents of NIXL for that.

One caller at a time uses it. A signal handler may raise at any step: then :meth:`Requests.begin_again`
makes everything whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

from datadist.transport import AddressError, TransferError, TransportError, Unsupported
from datadist_nixl.library import Agent, NixlError
from datadist_nixl.memory import NixlRegion
from datadist_nixl.serving import rows
from datadist_nixl.stream import Stream
from datadist_nixl.transfer import Request, Transfer
from datadist_nixl.wire import (
    Kind,
    Refusal,
    WireError,
    pack_metadata,
    pack_request,
    parse_metadata,
    parse_refusal,
)

WINDOW = 3
"""Pieces of one transfer under way."""
BURST = 8
"""So often UCX looks at its sockets before we look at ours, while a large piece is on its way: each look
at UCX takes what a socket has, and looks at ours would keep the owner waiting."""
UNKNOWN = -1


class Requests:
    """By their numbers."""

    def __init__(
        self, stream: Stream, transfers: Mapping[Transfer, None], make_agent: Callable[[], Agent]
    ) -> None:
        self._stream = stream
        self._transfers = transfers
        self._make_agent = make_agent
        self._numbers = itertools.count(1)
        self._reads: dict[int, Request] = {}
        self._writes: dict[int, Request] = {}
        self._fences: dict[int, list[Request]] = {}
        """Writes that the owner has to confirm the end of, by the number of the fence."""
        self._landing: Agent | None = None
        """The owner writes through it."""
        self._generation = 0
        self._writer: Agent | None = None
        self._target = ""
        self._target_generation = UNKNOWN
        self.gone: dict[NixlRegion, None] = {}
        """Released; to be deregistered."""

    @property
    def knows_memory(self) -> bool:
        """Whether NIXL may know memory of ours."""
        return self._landing is not None or self._writer is not None

    def look(self) -> bool:
        """Send, let NIXL work, and take what has arrived; whether something has."""
        moved = False
        stream = self._stream
        stream.flush()
        if self._reads and self._landing is not None:
            for _ in range(BURST if any(each.large for each in self._reads.values()) else 1):
                self._landing.progress()
        for kind, number, body in stream.frames():
            self._take(kind, number, body)
            moved = True
        if self._writes:
            moved = self._look_at_writes() or moved
        if stream.unsent:
            stream.flush()
        return moved

    def ask(self, transfer: Transfer) -> None:
        """Ask for more pieces."""
        while transfer.todo and len(transfer.requests) < WINDOW and not transfer.ended:
            index = transfer.todo[0]
            piece, secret = transfer.pieces[index], transfer.side.their_secret
            request, number = Request(transfer, index), next(self._numbers)
            if transfer.write:
                memory, device = piece.their_kind
                body = pack_request(secret, memory, device, (piece.remote, piece.length))
                self._writes[number] = request
            else:
                self._show(piece.regions)
                memory, device = piece.kind
                vectors = (piece.remote, piece.local, piece.length)
                body = pack_request(secret, memory, device, vectors)
                request.begun = True
                self._reads[number] = request
            transfer.requests[number] = request
            self._stream.put(Kind.WRITE if transfer.write else Kind.READ, number, body)
            transfer.todo.popleft()

    def _show(self, regions: tuple[NixlRegion, ...]) -> None:
        """Have the owner know memory of ours."""
        if self._landing is None:
            self._generation += 1
            self._landing = self._make_agent()
        for metadata in self._landing.register(regions):
            self._stream.put(Kind.MEMORY, 0, pack_metadata(self._generation, metadata))

    # -- what the owner says ---------------------------------------------------------------------

    def _take(self, kind: int, number: int, body: memoryview) -> None:
        if kind == Kind.DONE:
            self._finish(self._reads, number)
        elif kind == Kind.GO:
            self._write(number)
        elif kind == Kind.TARGET:
            self._learn(*parse_metadata(body))
        elif kind == Kind.REFUSED:
            self._refused(number, *parse_refusal(body))
        elif kind == Kind.FENCED:
            for fence in [each for each in self._fences if each <= number]:
                for request in self._fences[fence]:
                    request.settled = True
                del self._fences[fence]
        else:
            raise WireError(f"a message has kind {kind}")

    def _finish(self, requests: dict[int, Request], number: int) -> None:
        """A piece is in place."""
        request = requests.get(number)
        if request is not None:
            request.settled = True
            transfer = request.transfer
            transfer.requests.pop(number, None)
            transfer.piece_done(request.index)
            del requests[number]

    def _learn(self, generation: int, metadata: bytes) -> None:
        """The owner's memory; a new generation is another agent of NIXL, which needs a new one here.

        What the owner said before it took a FENCE is about an agent that the FENCE ends.
        """
        if self._fences:
            return
        if generation != self._target_generation and self._writer is not None:
            self.begin_again_writes("the owner has given up its end")
            return
        self._target_generation = generation
        if self._writer is None:
            self._writer = self._make_agent()
        self._target = self._writer.load(metadata)

    def _write(self, number: int) -> None:
        """The owner allows a write."""
        request = self._writes.get(number)
        if request is None or request.begun:
            return
        piece, writer = request.transfer.pieces[request.index], self._writer
        if writer is None:
            raise NixlError("the owner allows a write to memory that is not known here")
        writer.register(piece.regions)
        (memory, device), (their_memory, their_device) = piece.kind, piece.their_kind
        request.handle = writer.prepare(
            self._target, rows(piece.local, piece.length, device), memory,
            rows(piece.remote, piece.length, their_device), their_memory,
        )  # fmt: skip
        request.begun = True
        if request.transfer.ended:  # after that: who ends it looks whether it has begun
            request.begun = False
            self._written(number, request)
        elif writer.begin(request.handle):
            self._written(number, request)

    def _look_at_writes(self) -> bool:
        """Finish writes that have ended; whether there were any."""
        writer, moved = self._writer, False
        if writer is not None:
            writer.progress()  # sends as much as it can; `ended` sends once
        for number, request in list(self._writes.items()):
            if request.begun and writer is not None and writer.ended(request.handle):
                self._written(number, request)
                moved = True
        return moved

    def _written(self, number: int, request: Request) -> None:
        self._stream.put(Kind.WRITTEN, number)
        if self._writer is not None:
            self._writer.release(request.handle)
        if request.begun:
            self._finish(self._writes, number)
        else:
            request.transfer.requests.pop(number, None)
            del self._writes[number]

    def _refused(self, number: int, refusal: Refusal, text: str) -> None:
        request = self._reads.pop(number, None) or self._writes.pop(number, None)
        if request is None:
            return
        request.settled = True
        transfer = request.transfer
        transfer.requests.pop(number, None)
        if refusal is Refusal.FAILED:
            again = self.begin_again_writes if transfer.write else self.begin_again_reads
            again(f"the owner says: {text}")
            return
        text = f"rank {transfer.side.rank}: {text}"
        errors: dict[Refusal, TransportError] = {
            Refusal.OUTSIDE: AddressError(text),
            Refusal.FORBIDDEN: Unsupported(text),
        }
        transfer.end(errors.get(refusal) or TransferError(text))

    # -- giving up agents --------------------------------------------------------------------------

    def begin_again(self, reason: str, counts: bool = True) -> None:
        """End everything under way, and ask again for what is wanted still."""
        self.begin_again_reads(reason, counts)
        self.begin_again_writes(reason, counts)

    def begin_again_reads(self, reason: str, counts: bool = True) -> None:
        """Destroy the agent through which the owner writes: nothing lands any more."""
        if self._landing is not None:
            self._landing.close()  # known until then: an exception of a handler may come meanwhile
            self._landing = None
        reads, self._reads = self._reads, {}
        for number, request in reads.items():
            request.settled = True
            request.transfer.requests.pop(number, None)
        self._ask_again(False, reason, counts)

    def begin_again_writes(self, reason: str, counts: bool = True) -> None:
        """Destroy the agent that writes; the owner confirms when nothing lands any more."""
        writes = self._writes
        begun = [request for request in writes.values() if request.begun]
        if writes or self._target_generation != UNKNOWN:
            fence = next(self._numbers)
            self._stream.put(Kind.FENCE, fence)
            self._fences[fence] = begun
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        for number, request in writes.items():
            request.handle = None  # it would keep the agent
            if request.begun:
                request.transfer.given_up.append(request)
            request.transfer.requests.pop(number, None)
        self._writes = {}
        self._target_generation = UNKNOWN
        self._ask_again(True, reason, counts)

    def _ask_again(self, write: bool, reason: str, counts: bool) -> None:
        for transfer in tuple(self._transfers):
            if transfer.write is write and not transfer.ended:
                transfer.again(reason, counts)

    def deregister_gone(self) -> None:
        """Forget memory that was released."""
        for region in list(self.gone):
            for agent in (self._landing, self._writer):
                if agent is not None:
                    agent.deregister(region)
            del self.gone[region]

    def confirm_all(self) -> None:
        """The owner's end is over: nothing lands there any more."""
        for request in itertools.chain.from_iterable(self._fences.values()):
            request.settled = True
        self._fences.clear()

    @property
    def unsettled(self) -> bool:
        """Whether something is under way, or to be done."""
        return bool(self._reads or self._writes or self._fences or self.gone)

    @property
    def unconfirmed(self) -> bool:
        """Whether the owner may still take bytes of a write."""
        return bool(self._fences) or any(each.begun for each in self._writes.values())

"""The asker's end of a connection: it asks an owner to write to our memory, or may write to its memory.

The callers do the work: one of them leads at a time and looks after the transfers of all. So nothing
waits for another thread on the way of a small transfer. What callers leave under way, the thread of the
service tends.

A signal handler may raise at any step of a caller that leads. The next one finds that, and begins all
requests again over new agents of NIXL: nothing that was under way touches memory then.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable

from datadist.base.texts import in_seconds
from datadist.transport import (
    AddressError,
    PeerLost,
    TransferError,
    TransferTimeout,
    TransportError,
    Unsupported,
)
from datadist_nixl.library import Agent, NixlError
from datadist_nixl.memory import NixlRegion
from datadist_nixl.pauses import pause
from datadist_nixl.serving import rows
from datadist_nixl.side import Side
from datadist_nixl.stream import Ended, Stream
from datadist_nixl.transfer import Request, Transfer
from datadist_nixl.wire import (
    MAX_METADATA,
    Kind,
    Refusal,
    WireError,
    hello,
    pack_metadata,
    pack_request,
    parse_metadata,
    parse_refusal,
)

log = logging.getLogger("datadist.nixl")

WINDOW = 3
"""Pieces of one transfer under way."""
FOLLOW_SECONDS = 0.02
"""So long a caller waits before it looks whether somebody leads."""
CLAIM_SECONDS = 2.0
FENCE_SECONDS = 2.0

LEAD = "lead"
UNKNOWN = -1


class Asker:
    """Asks one peer process."""

    def __init__(
        self, stream: Stream, greeting: bytes, near: bool, make_agent: Callable[[], Agent],
        tend: Callable[[Asker], None],
    ) -> None:  # fmt: skip
        self._stream = stream
        self._make_agent = make_agent
        self._tend = tend
        self._near = near
        """Whether the end of the peer's process ends the connection."""
        self.ended: str | None = None
        """Why it cannot be used any more."""
        self._lost = False
        self._closing = False
        self._claims: dict[str, object] = {}
        self._inside = False
        """Whether a leader is at work; when the next one finds that, the last one was interrupted."""
        self._transfers: dict[Transfer, None] = {}
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
        self._gone: dict[NixlRegion, None] = {}
        """Released; to be deregistered."""
        stream.put(Kind.HELLO, 0, hello(greeting))
        stream.most = MAX_METADATA

    # -- callers ---------------------------------------------------------------------------------

    def run(self, transfer: Transfer, timeout: float) -> None:
        """Move all of a transfer. Raises as :meth:`datadist.transport.Link.read`."""
        deadline = time.monotonic() + timeout
        token, claims = object(), self._claims
        try:
            self._transfers[transfer] = None
            while not transfer.ended:
                if claims.setdefault(LEAD, token) is token:
                    self._lead(transfer, deadline)
                else:
                    left = max(0.0, deadline - time.monotonic())
                    transfer.wait(min(FOLLOW_SECONDS, left))
                if not transfer.ended and time.monotonic() >= deadline:
                    text = f"rank {transfer.side.rank} did not end it in {in_seconds(timeout)}"
                    transfer.end(TransferTimeout(text, link_usable=True))
        finally:
            # Nothing is called before: what a signal handler raises would leave the claim.
            if LEAD in claims and claims[LEAD] is token:
                del claims[LEAD]
            self._transfers.pop(transfer, None)
            self._nudge_all()
        transfer.result()

    def leave(self, transfer: Transfer) -> bool:
        """After a failed :meth:`run`: whether it has settled. The service tends what has not."""
        if transfer.settled() and not self._inside:
            return True
        self._tend(self)
        return transfer.settled()

    def _nudge_all(self) -> None:
        """Somebody has to lead."""
        for transfer in tuple(self._transfers):
            transfer.nudge()

    def _lead(self, transfer: Transfer, deadline: float) -> None:
        last = time.monotonic()
        while not transfer.ended:
            moved = self._pump()
            now = time.monotonic()
            if moved:
                last = now
            elif now >= deadline:
                return
            else:
                pause(now - last)

    def tend(self) -> bool:
        """On the thread of the service: let go on what callers have left; whether there is something."""
        token, claims = object(), self._claims
        try:
            if claims.setdefault(LEAD, token) is not token:
                return True
            self._pump()
            if self._closing and not self._unconfirmed():
                self._end("it is closed", True)
                self._stream.close()
                return False
            return self.ended is None and bool(self._closing or self._unsettled())
        finally:
            if LEAD in claims and claims[LEAD] is token:
                del claims[LEAD]
            self._nudge_all()

    def abandon(self) -> None:
        """The service ends: give everything back, whatever is under way."""
        self._end("the transport is closed", False)
        self._stream.close()

    def _unsettled(self) -> bool:
        return bool(self._reads or self._writes or self._fences or self._gone)

    def _unconfirmed(self) -> bool:
        """Whether the owner may still take bytes of a write."""
        return self.ended is None and bool(
            self._fences or any(each.begun for each in self._writes.values())
        )

    # -- one round -------------------------------------------------------------------------------

    def _pump(self) -> bool:
        """Let everything go on; whether something has happened."""
        if self.ended is not None:
            if self._lost:
                self._confirm_all()
            self._fail_all()
            return True
        interrupted, self._inside = self._inside, True
        moved = False
        try:
            if interrupted:
                self._begin_again("a caller was interrupted", counts=False)
            if self._gone:
                self._deregister()
            for transfer in tuple(self._transfers):
                if transfer.todo:
                    self._ask(transfer)
            moved = self._look()
        except Ended as error:
            self._end(str(error), error.by_peer)
            moved = True
        except WireError as error:
            self._end(f"it breaks the protocol: {error}", False)
            moved = True
        except NixlError as error:
            log.debug("NIXL has to begin again with a peer: %s", error)
            self._begin_again(str(error))
            moved = True
        if self._lost and not self._near:
            self._end("core has lost the peer", True)
        self._inside = False
        return moved

    def _look(self) -> bool:
        moved = False
        stream = self._stream
        stream.flush()
        if self._reads and self._landing is not None:
            self._landing.progress()
        for kind, number, body in stream.frames():
            self._take(kind, number, body)
            moved = True
        if self._writes:
            moved = self._look_at_writes() or moved
        if stream.unsent:
            stream.flush()
        return moved

    def _ask(self, transfer: Transfer) -> None:
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
        """The owner's memory; a new generation is another agent of NIXL, which needs a new one here."""
        if generation != self._target_generation and self._writer is not None:
            self._begin_again_writes("the owner has given up its end")
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
            again = self._begin_again_writes if transfer.write else self._begin_again_reads
            again(f"the owner says: {text}")
            return
        text = f"rank {transfer.side.rank}: {text}"
        errors: dict[Refusal, TransportError] = {
            Refusal.OUTSIDE: AddressError(text),
            Refusal.FORBIDDEN: Unsupported(text),
        }
        transfer.end(errors.get(refusal) or TransferError(text))

    # -- giving up agents --------------------------------------------------------------------------

    def _begin_again(self, reason: str, counts: bool = True) -> None:
        """End everything under way, and ask again for what is wanted still."""
        self._begin_again_reads(reason, counts)
        self._begin_again_writes(reason, counts)

    def _begin_again_reads(self, reason: str, counts: bool = True) -> None:
        """Destroy the agent through which the owner writes: nothing lands any more."""
        landing, self._landing = self._landing, None
        if landing is not None:
            landing.close()
        reads, self._reads = self._reads, {}
        for number, request in reads.items():
            request.settled = True
            request.transfer.requests.pop(number, None)
        self._ask_again(False, reason, counts)

    def _begin_again_writes(self, reason: str, counts: bool = True) -> None:
        """Destroy the agent that writes; the owner confirms when nothing lands any more."""
        writes = self._writes
        begun = [request for request in writes.values() if request.begun]
        if writes or self._target_generation != UNKNOWN:
            fence = next(self._numbers)
            self._stream.put(Kind.FENCE, fence)
            self._fences[fence] = begun
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        self._writes = {}
        for number, request in writes.items():
            if request.begun:
                request.transfer.given_up.append(request)
            request.transfer.requests.pop(number, None)
        self._target_generation = UNKNOWN
        self._ask_again(True, reason, counts)

    def _ask_again(self, write: bool, reason: str, counts: bool) -> None:
        for transfer in tuple(self._transfers):
            if transfer.write is write and not transfer.ended:
                transfer.again(reason, counts)

    def _deregister(self) -> None:
        for region in list(self._gone):
            for agent in (self._landing, self._writer):
                if agent is not None:
                    agent.deregister(region)
            del self._gone[region]

    def deregister(self, region: NixlRegion) -> None:
        """A region is about to be released; no transfer uses it."""
        if self._landing is not None or self._writer is not None:
            self._gone[region] = None
            self._tend(self)

    # -- the end ---------------------------------------------------------------------------------

    def force(self, side: Side, transfers: list[Transfer]) -> None:
        """Have these transfers of a side, which has ended, settle.

        Raises :class:`TransferError` where the owner does not confirm that.
        """
        until = time.monotonic() + FENCE_SECONDS
        token, claims = object(), self._claims
        try:
            while claims.setdefault(LEAD, token) is not token:
                if time.monotonic() >= until:
                    raise TransferError(f"rank {side.rank}: another call holds the connection")
                time.sleep(0.0005)
            self._force(side, transfers, until)
        finally:
            if LEAD in claims and claims[LEAD] is token:
                del claims[LEAD]
            self._nudge_all()

    def _force(self, side: Side, transfers: list[Transfer], until: float) -> None:
        left = [each for each in transfers if not each.settled()]
        interrupted = self._inside
        if self.ended is None and not interrupted:
            self._inside = True
            if any(not each.write for each in left):
                self._begin_again_reads("a transfer was given up", False)
            if any(each.write for each in left):
                self._begin_again_writes("a transfer was given up", False)
            self._inside = False
        while not all(each.settled() for each in left):
            if time.monotonic() >= until:
                self._tend(self)
                raise TransferError(
                    f"rank {side.rank} has not confirmed within {in_seconds(FENCE_SECONDS)} that it "
                    "takes no bytes any more (is it stopped?)"
                )
            self._pump()
            time.sleep(0.0005)

    def lose(self) -> None:
        """Core has lost the peer. From any thread, never blocks."""
        self._lost = True
        self._fail_all()
        self._tend(self)

    def _fail_all(self) -> None:
        for transfer in tuple(self._transfers):
            rank = transfer.side.rank
            transfer.end(PeerLost(f"rank {rank} is lost: {self.ended or 'core says so'}", rank))

    @property
    def usable(self) -> bool:
        """Whether transfers are possible."""
        return self.ended is None and not self._lost and not self._closing

    def _end(self, reason: str, confirmed: bool) -> None:
        """The connection cannot be used any more; ``confirmed`` says that the owner's end is over."""
        self._begin_again_reads(reason, False)
        self._begin_again_writes(reason, False)
        self.ended = reason
        if confirmed:
            self._confirm_all()
        self._fail_all()

    def _confirm_all(self) -> None:
        for request in itertools.chain.from_iterable(self._fences.values()):
            request.settled = True
        self._fences.clear()

    def close(self) -> None:
        """Give the connection back, at once or as soon as the owner has confirmed what was under way."""
        self._closing = True
        until = time.monotonic() + CLAIM_SECONDS
        while self._claims.get(LEAD) is not None and time.monotonic() < until:
            time.sleep(0.0005)
        if self.tend():
            self._tend(self)

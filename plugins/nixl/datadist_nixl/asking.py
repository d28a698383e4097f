"""The asker's end of a connection: it asks an owner to write to our memory, or may write to its memory.

The callers do the work: one of them leads at a time and looks after the transfers of all. So nothing
waits for another thread on the way of a small transfer. What callers leave under way, the thread of the
service tends.

A signal handler may raise at any step of a caller that leads. The next one finds that, and begins all
requests again over new agents of NIXL: nothing that was under way touches memory then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from datadist.base.texts import in_seconds
from datadist.transport import PeerLost, TransferError, TransferTimeout
from datadist_nixl.library import Agent, NixlError
from datadist_nixl.memory import NixlRegion
from datadist_nixl.pauses import pause
from datadist_nixl.requests import Requests
from datadist_nixl.side import Side
from datadist_nixl.stream import Ended, Stream
from datadist_nixl.transfer import Transfer
from datadist_nixl.wire import MAX_METADATA, Kind, WireError, hello

log = logging.getLogger("datadist.nixl")

FOLLOW_SECONDS = 0.02
"""So long a caller waits before it looks whether somebody leads."""
MOST_PAUSE = 0.002
"""Of a caller: it has to notice soon that its transfer was aborted."""
CLAIM_SECONDS = 2.0
FENCE_SECONDS = 2.0


class Asker:
    """Asks one peer process."""

    def __init__(
        self, stream: Stream, greeting: bytes, near: bool, make_agent: Callable[[], Agent],
        tend: Callable[[Asker], None],
    ) -> None:  # fmt: skip
        self._stream = stream
        self._tend = tend
        self._near = near
        """Whether the end of the peer's process ends the connection."""
        self.ended: str | None = None
        """Why it cannot be used any more."""
        self._lost = False
        self._closing = False
        self._claims: dict[object, None] = {}
        """The first one leads. One call of C code gives a claim back, by its token, also a second time:
        Python 3.10 skips a `finally` where another exception comes as that begins."""
        self._inside = False
        """Whether a leader is at work; when the next one finds that, the last one was interrupted."""
        self._transfers: dict[Transfer, None] = {}
        self._requests = Requests(stream, self._transfers, make_agent)
        stream.put(Kind.HELLO, 0, hello(greeting))
        stream.most = MAX_METADATA
        tend(self)  # sends the greeting: the owner does not wait for it until the first transfer

    # -- callers ---------------------------------------------------------------------------------

    def run(self, transfer: Transfer, timeout: float) -> None:
        """Move all of a transfer. Raises as :meth:`datadist.transport.Link.read`."""
        deadline = time.monotonic() + timeout
        claims = self._claims
        try:
            self._transfers[transfer] = None
            while not transfer.ended:
                if self._claim(transfer):
                    self._lead(transfer, deadline)
                else:
                    left = max(0.0, deadline - time.monotonic())
                    transfer.wait(min(FOLLOW_SECONDS, left))
                if not transfer.ended and time.monotonic() >= deadline:
                    text = f"rank {transfer.side.rank} did not end it in {in_seconds(timeout)}"
                    transfer.end(TransferTimeout(text, link_usable=True))
        finally:
            claims.pop(transfer, None)
            self._transfers.pop(transfer, None)
            self._nudge_all()
        transfer.result()

    def _claim(self, token: object) -> bool:
        """Whether the caller leads from now on: no other claim came before."""
        self._claims[token] = None
        first, *_ = list(self._claims)  # in one step: other threads add and take theirs
        if first is token:
            return True
        self._claims.pop(token, None)
        return False

    def leave(self, transfer: Transfer) -> bool:
        """After a failed :meth:`run`: whether it has settled. The service tends what has not."""
        self._claims.pop(transfer, None)  # in case that `run` could not
        self._transfers.pop(transfer, None)
        self._nudge_all()
        if transfer.settled() and not self._inside:
            return True
        self._tend(self)
        return transfer.settled()

    def _nudge_all(self) -> None:
        """Somebody has to lead."""
        for transfer in tuple(self._transfers):
            transfer.nudge()

    def _lead(self, transfer: Transfer, deadline: float) -> None:
        begun = last = time.monotonic()
        while not transfer.ended:
            moved = self._pump()
            now = time.monotonic()
            if now >= deadline:
                return
            if moved:
                last = now
            else:
                pause(now - last, first=last is begun, most=min(MOST_PAUSE, deadline - now))

    def tend(self) -> bool:
        """On the thread of the service: let go on what callers have left; whether there is something."""
        token, claims = object(), self._claims
        try:
            if not self._claim(token):
                return True
            self._pump()
            if self._closing and (self.ended is not None or not self._requests.unconfirmed):
                self._end("it is closed", True)
                self._stream.close()
                return False
            left = self._closing or self._requests.unsettled or self._stream.unsent
            return self.ended is None and bool(left)
        finally:
            claims.pop(token, None)
            self._nudge_all()

    def abandon(self) -> None:
        """The service ends: give everything back, whatever is under way."""
        self._end("the transport is closed", False)
        self._stream.close()

    # -- one round -------------------------------------------------------------------------------

    def _pump(self) -> bool:
        """Let everything go on; whether something has happened."""
        if self.ended is not None:
            if self._lost:
                self._requests.confirm_all()
            self._fail_all()
            return True
        interrupted, self._inside = self._inside, True
        moved = False
        try:
            if interrupted:
                self._requests.begin_again("a caller was interrupted", counts=False)
            if self._requests.gone:
                self._requests.deregister_gone()
            for transfer in tuple(self._transfers):
                if transfer.todo:
                    self._requests.ask(transfer)
            moved = self._requests.look()
        except Ended as error:
            self._end(str(error), error.by_peer)
            moved = True
        except WireError as error:
            self._end(f"it breaks the protocol: {error}", False)
            moved = True
        except NixlError as error:
            log.debug("NIXL has to begin again with a peer: %s", error)
            self._requests.begin_again(str(error))
            moved = True
        if self._lost and not self._near:
            self._end("core has lost the peer", True)
        self._inside = False
        return moved

    def deregister(self, region: NixlRegion) -> None:
        """A region is about to be released; no transfer uses it."""
        if self._requests.knows_memory:
            self._requests.gone[region] = None
            self._tend(self)

    # -- the end ---------------------------------------------------------------------------------

    def force(self, side: Side, transfers: list[Transfer]) -> None:
        """Have these transfers of a side, which has ended, settle.

        Raises :class:`TransferError` where the owner does not confirm that.
        """
        until = time.monotonic() + FENCE_SECONDS
        claims = self._claims
        try:
            while not self._claim(side):
                if time.monotonic() >= until:
                    raise TransferError(f"rank {side.rank}: another call holds the connection")
                time.sleep(0.0005)
            self._force(side, transfers, until)
        finally:
            claims.pop(side, None)
            self._nudge_all()

    def _force(self, side: Side, transfers: list[Transfer], until: float) -> None:
        left = [each for each in transfers if not each.settled()]
        interrupted = self._inside
        if self.ended is None and not interrupted:
            self._inside = True
            if any(not each.write for each in left):
                self._requests.begin_again_reads("a transfer was given up", False)
            if any(each.write for each in left):
                self._requests.begin_again_writes("a transfer was given up", False)
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
        self._requests.begin_again_reads(reason, False)
        self._requests.begin_again_writes(reason, False)
        self.ended = reason
        if confirmed:
            self._requests.confirm_all()
        self._fail_all()

    def close(self) -> None:
        """Give the connection back, at once or as soon as the owner has confirmed what was under way."""
        self._closing = True
        until = time.monotonic() + CLAIM_SECONDS
        while self._claims and time.monotonic() < until:
            time.sleep(0.0005)
        if self.tend():
            self._tend(self)

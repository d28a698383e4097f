"""Our connections to one peer: several queue pairs, each of which serves one transfer at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence

from datadist.transport import TransferError, TransferTimeout
from datadist_rdma.device import Device
from datadist_rdma.memory import Ranges
from datadist_rdma.ports import Gid
from datadist_rdma.queue_pair import QueuePair

PAUSE = 0.0005
"""Seconds between two looks for a queue pair, where more transfers run than there are pairs."""

UNKNOWN = "an earlier transfer was interrupted"
"""Why a path has ended, until the reason is known."""


class Call:
    """One call of the link; ``uses`` is what it has claimed of a path, or is about to claim."""

    __slots__ = ("uses",)

    def __init__(self) -> None:
        self.uses: object = None


class Path:
    """The queue pairs to one peer, who uses each of them, and whether they may still be used.

    They end together. A queue pair that failed at our end is silent at the other one, where the next
    transfer over it would take us for dead. So a path with some of its queue pairs would be usable
    here and lost there.
    """

    def __init__(self, rank: int, device: Device, gid: Gid, pairs: Sequence[QueuePair]) -> None:
        self.rank = rank
        self.device = device
        self.gid = gid
        self.pairs = pairs
        self.remote: Ranges | None = None
        """The memory of the peer that we may access; None until its offer was attached."""
        self.writable = False
        self.ended: str | None = None
        """Why no transfer is possible any more."""
        self.users: dict[object, Call] = {}
        """Which call uses a queue pair; a call takes its own entry out, without calling anything."""

    def take(self, call: Call, deadline: float) -> QueuePair:
        """A queue pair that no other call uses.

        There is always one for as many calls as both ends have queue pairs; more than these wait.
        Raises :class:`TransferError` where the path has ended, :class:`TransferTimeout`.
        """
        while True:
            for pair in self.pairs:
                if self.claim(call, pair):
                    self.check()  # after the claim: who ends the path looks for claims after that
                    return pair
            self.check()
            if time.monotonic() >= deadline:
                raise TransferTimeout(
                    f"other transfers use all {len(self.pairs)} queue pairs to rank {self.rank}",
                    link_usable=True,
                )
            time.sleep(PAUSE)

    def claim(self, call: Call, what: object) -> bool:
        """Enter what a call uses in :attr:`users`; False if another call uses it."""
        call.uses = what  # first: what a signal handler raises here must not leave it claimed
        return self.users.setdefault(what, call) is call

    def check(self) -> None:
        """Raise :class:`TransferError` where the path has ended."""
        if self.ended is not None:
            raise TransferError(self.ended)

    def end(self, reason: str) -> None:
        """Refuse further transfers, and wake those in flight, whose threads end them."""
        if self.ended in (None, UNKNOWN):
            self.ended = reason
        for pair in self.pairs:
            pair.notified.set()

    def wait_until_unused(self, deadline: float) -> bool:
        """Whether no call uses anything of it any more, by the deadline at the latest."""
        while self.users:
            if time.monotonic() >= deadline:
                return False
            time.sleep(PAUSE)
        return True

    def keep(self, count: int) -> None:
        """Close all but the first ``count`` queue pairs: the peer has no more."""
        spare, self.pairs = self.pairs[count:], self.pairs[:count]
        for pair in spare:
            pair.close()

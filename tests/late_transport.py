"""A transport whose transfers stay in flight: they land when a test says so, or when the peer goes on.

The kernel copies, as in the reference transport. A transfer with a stopped peer, or while transfers are
held, ends by its deadline, and goes on by itself.
"""

from __future__ import annotations

import threading
import time
from array import array
from pathlib import Path
from typing import TYPE_CHECKING

from datadist.testing.reference import LIBC, ReferenceLink, ReferenceTransport
from datadist.transport import (
    Access,
    Group,
    Region,
    TransferError,
    TransferTimeout,
    Unsupported,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

SECONDS = 60.0
LATE_SECONDS = 0.2
"""How long a call waits for a transfer that is held, or whose peer is stopped."""


class Flight:
    """One transfer, on a thread of its own."""

    def __init__(self, link: LateLink, rank: int, call: object, vectors: Sequence[Buffer]) -> None:
        self._link, self._rank, self._call = link, rank, call
        self._vectors = [array("q", bytes(memoryview(vector).cast("B"))) for vector in vectors]
        self.ended = threading.Event()
        self.given_up = False
        threading.Thread(target=self._run, daemon=True).start()

    def settled(self) -> bool:
        return self.ended.is_set()

    def _run(self) -> None:
        while not self.given_up and (HELD.is_set() or _is_stopped(self._link.pid(self._rank))):
            time.sleep(0.002)
        if not self.given_up:
            self._link.land(self._rank, self._call, self._vectors)
        self.ended.set()


HELD = threading.Event()
"""While set, transfers of this process land nowhere."""


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


class LateLink(ReferenceLink):
    """It cannot end what is in flight."""

    def __init__(self, group: Group, regions: Sequence[Region], access: Access) -> None:
        super().__init__(group, regions, access)
        self.flights: list[Flight] = []
        self.forced: list[int] = []
        FORCED.append(self.forced)

    def pid(self, rank: int) -> int:
        return self._group.peers[rank].pid or 0

    def read(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        self._fly(rank, LIBC.process_vm_readv, (local, remote, length), timeout)

    def write(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        self._fly(rank, LIBC.process_vm_writev, (local, remote, length), timeout)

    def _fly(self, rank: int, call: object, vectors: Sequence[Buffer], timeout: float) -> None:
        if rank in self._ended:
            raise TransferError("the link was aborted or closed")
        flight = Flight(self, rank, call, vectors)
        self.flights.append(flight)
        late = HELD.is_set() or _is_stopped(self.pid(rank))
        if not flight.ended.wait(min(timeout, LATE_SECONDS) if late else timeout):
            error = TransferTimeout("the peer did not take part", link_usable=True)
            error.in_flight = flight
            raise error

    def land(self, rank: int, call: object, vectors: Sequence[array[int]]) -> None:
        path = self._paths[rank]
        for here, there, size in zip(*vectors, strict=True):
            path.copy(call, here, there, size)  # type: ignore[arg-type]

    def force(self, rank: int) -> None:
        self.forced.append(rank)
        raise Unsupported("nothing but the peer can end it")


FORCED: list[list[int]] = []
"""Ranks for which `force` was called, of each link."""


class ForcedLink(LateLink):
    """It can."""

    def force(self, rank: int) -> None:
        self.forced.append(rank)
        self._ended.add(rank)
        for flight in self.flights:
            flight.given_up = True
            assert flight.ended.wait(SECONDS)


class LateTransport(ReferenceTransport):
    """See :class:`LateLink`."""

    def open(self, group: Group, regions: Sequence[Region], access: Access) -> LateLink:
        return LateLink(group, regions, access)


class ForcedTransport(LateTransport):
    """See :class:`ForcedLink`."""

    def open(self, group: Group, regions: Sequence[Region], access: Access) -> LateLink:
        return ForcedLink(group, regions, access)

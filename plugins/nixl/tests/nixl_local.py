"""Two transports in this process, linked, for tests that look at one of them."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
from datadist_nixl import NixlTransport
from datadist_nixl.link import NixlLink
from numpy.typing import NDArray

from datadist.transport import Access, Group, Offer, Peer, Placement, Region, TransportOptions


class End:
    """One of them."""

    def __init__(self, stack: ExitStack, rank: int, size: int, access: Access) -> None:
        self.rank = rank
        self.transport = NixlTransport(TransportOptions())
        stack.callback(self.transport.close)
        self.region: Region = self.transport.allocate(size, Placement.HOST)
        stack.callback(self.transport.release, self.region)
        self.bytes: NDArray[np.uint8] = np.frombuffer(
            (ctypes.c_char * size).from_address(self.region.address), np.uint8
        )
        peer = Peer(1 - rank, f"engine-{1 - rank}")
        self.peer = Peer(1 - rank, peer.incarnation, connection=self.transport.connect(peer))
        stack.callback(self.transport.disconnect, self.peer)
        self.link = self.open(access)
        stack.callback(self.link.close)

    def open(self, access: Access = Access.READ_WRITE) -> NixlLink:
        """A link over the memory."""
        peers = {self.rank: Peer(self.rank, f"engine-{self.rank}"), 1 - self.rank: self.peer}
        group = Group("test", self.rank, peers, None, time.monotonic() + 60)
        return self.transport.open(group, [self.region], access)

    def move(
        self, verb: str, other: End, segments: list[tuple[int, int, int]], timeout: float = 30
    ) -> None:
        """Read from the other end, or write to it: offsets here and there, bytes."""
        here, there, length = np.array(segments, np.int64).T
        vectors = (here + self.region.address, there + other.region.address, length.copy())
        getattr(self.link, verb)(other.rank, *vectors, timeout)


@contextmanager
def linked(size: int, access: Access = Access.READ_WRITE) -> Iterator[tuple[End, End]]:
    """Both."""
    with ExitStack() as stack:
        one, two = (End(stack, rank, size, access) for rank in (0, 1))
        for end, other in ((one, two), (two, one)):
            end.link.attach(other.rank, Offer(other.link.offer(end.rank).data))
        yield one, two

"""The path to one peer: its stream, its memory, its process."""

from __future__ import annotations

import threading

from datadist.base.pidfds import has_ended
from datadist.transport import Peer, Placement
from datadist_hccl.flight import Flight
from datadist_hccl.offer import OfferData
from datadist_hccl.segments import Outside, Windows


class Path:
    """Our path to one peer: its stream, its memory, and the reason if it cannot be used any more."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.rdma: bool | None = None
        """None until there is a rank table."""
        self.offered: OfferData | None = None
        self.stream = 0
        self.windows: Windows | None = None
        self.host_windows = Windows(())
        """The peer's memory that HCCS can not reach."""
        self.writable = False
        self.lock = threading.Lock()
        self.stream_lock = threading.Lock()
        """Held while the stream is aborted or replaced."""
        self.aborted = False
        self.moving = False
        self.broken: str | None = None
        self.flight: Flight | None = None
        """What may still be going on from an earlier transfer."""

    def settle(self) -> None:
        """Determine the reachable part of the offer, after the kind of connection is known."""
        if self.offered is None or self.rdma is None:
            return
        regions = self.offered.regions
        host = [] if self.rdma else [r for r in regions if r.placement == Placement.HOST]
        self.host_windows = Windows((region.address, region.size) for region in host)
        self.windows = Windows(
            (region.address, region.size) for region in regions if region not in host
        )


def explain(path: Path, rank: int, error: Outside) -> str:
    """Why a segment cannot be moved."""
    if error.local:
        return f"the local memory at {error.address:#x} is not registered"
    if path.host_windows.holds(error.address):
        return (
            f"the memory of rank {rank} at {error.address:#x} is memory of its host, which HCCS does "
            "not reach: use DEVICE memory, or HCCL_INTRA_ROCE_ENABLE=1 on all ranks"
        )
    return f"the memory at {error.address:#x} is not what rank {rank} offered"


def gone(peer: Peer) -> bool:
    """Whether the peer's process has ended; False where that cannot be known."""
    return peer.pidfd is not None and has_ended(peer.pidfd)

"""One rank of a verification: its transport, its memory, and links that both ranks create.

Everything that the ranks tell each other goes through HCCL's exchange of blobs, so that they may
run on different machines.
"""

from __future__ import annotations

import ctypes
import json
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datadist.rank_table import RankTable
from datadist.transport import (
    Access,
    Group,
    Link,
    Offer,
    Peer,
    Placement,
    Region,
    TransportOptions,
)
from datadist_hccl.transport import HcclTransport

LINK_SECONDS = 60.0
SEED = 20_000


@dataclass
class Linked:
    """A link to the other rank, and where its regions lie."""

    link: Link
    other: int
    remote: dict[str, int]

    def tell(self, value: Any) -> Any:
        """Give a value to the other rank, which does the same; its value."""
        blobs = self.link.exchange(json.dumps(value).encode())
        return json.loads(blobs[self.other])


class Session:
    """Rank 0 or 1 of two; regions "device" and "host" of ``size`` bytes each."""

    def __init__(self, table: RankTable, rank: int, device: int, size: int) -> None:
        self.table = table
        self.rank = rank
        self.size = size
        self.transport = HcclTransport(TransportOptions(device_id=device))
        self.regions: dict[str, Region] = {
            "device": self.transport.allocate(size, Placement.DEVICE),
            "host": self.transport.allocate(size, Placement.HOST),
        }
        self.links: list[Link] = []

    def group(self, name: str, seconds: float) -> Group:
        """A group of both ranks."""
        peers = {rank: Peer(rank, f"{name}-{rank}") for rank in (0, 1)}
        return Group(f"verify-{name}", self.rank, peers, self.table, time.monotonic() + seconds)

    def open(self, name: str, seconds: float = LINK_SECONDS) -> Link:
        """A link that has not met the other rank."""
        regions = list(self.regions.values())
        link = self.transport.open(self.group(name, seconds), regions, Access.READ_WRITE)
        self.links.append(link)
        return link

    def link(self, name: str) -> Linked:
        """A link, once the other rank makes it too."""
        link, other = self.open(name), 1 - self.rank
        link.join(LINK_SECONDS)
        mine = {
            "offer": link.offer(other).data.decode(),
            "regions": {label: region.address for label, region in self.regions.items()},
        }
        theirs = Linked(link, other, {}).tell(mine)
        link.attach(other, Offer(theirs["offer"].encode()))
        return Linked(link, other, theirs["regions"])

    def move(
        self, linked: Linked, write: bool, offsets: Sequence[tuple[int, int]], size: int,
        timeout: float = 30.0, local: str = "device", remote: str = "device",
    ) -> float:  # fmt: skip
        """Move ``size`` bytes per (local, remote) pair of offsets; the seconds that it took."""
        vectors = (
            array("q", [self.regions[local].address + mine for mine, _ in offsets]),
            array("q", [linked.remote[remote] + theirs for _, theirs in offsets]),
            array("q", [size] * len(offsets)),
        )
        began = time.monotonic()
        (linked.link.write if write else linked.link.read)(linked.other, *vectors, timeout)
        return time.monotonic() - began

    # -- contents: the host can touch only its own memory, which goes to the device by copies ------

    def _host(self) -> NDArray[np.uint8]:
        memory = (ctypes.c_uint8 * self.size).from_address(self.regions["host"].address)
        return np.frombuffer(memory, np.uint8)

    def _copy(self, dst: str, src: str) -> None:
        to, frm = (array("q", [self.regions[label].address]) for label in (dst, src))
        self.transport.copy(to, frm, array("q", [self.size]))

    def pattern(self, number: int) -> NDArray[np.uint8]:
        """Bytes that both ranks can compute."""
        return np.random.default_rng(SEED + number).integers(0, 256, self.size, np.uint8)

    def fill(self, number: int, label: str = "device") -> None:
        """Write a pattern to a region."""
        self._host()[:] = self.pattern(number)
        if label == "device":
            self._copy("device", "host")

    def contents(self, label: str = "device") -> NDArray[np.uint8]:
        """A copy of a region."""
        if label == "device":
            self._copy("host", "device")
        return self._host().copy()

    def close(self) -> None:
        """Give everything back."""
        for link in self.links:
            link.close()
        for region in self.regions.values():
            self.transport.release(region)
        self.regions.clear()
        self.transport.close()

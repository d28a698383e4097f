"""Ranks of one link in real processes: what runs in them, and how a test leads them."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import time
from array import array
from collections.abc import Sequence
from typing import Any

from datadist_hccl import HcclTransport

import hccl_sim
from datadist.rank_table import parse_rank_table
from datadist.transport import (
    Access,
    Group,
    Link,
    Offer,
    Peer,
    Placement,
    Region,
    TransferError,
    TransportOptions,
)
from tests.nodes import Here, Node
from tests.waiting import until

MIB = 1 << 20
SIZE = 4 * MIB


class Rank:
    """What a process keeps: transport, regions, links, and the simulator."""

    def __init__(self, device: int, options: dict[str, Any]) -> None:
        self.transport = HcclTransport(TransportOptions(device_id=device, **options))
        self.sim = hccl_sim.Simulator()
        self.regions: dict[str, Region] = {}
        self.links: dict[str, Link] = {}
        self.remote: dict[str, dict[int, dict[str, int]]] = {}


def start(here: Here, device: int, options: dict[str, Any]) -> None:
    """Make the transport, with memory "device" and "host"."""
    rank = here.any["rank"] = Rank(device, options)
    rank.regions["device"] = rank.transport.allocate(SIZE, Placement.DEVICE)
    rank.regions["host"] = rank.transport.allocate(SIZE, Placement.HOST)


def of(here: Here) -> Rank:
    """The rank of a process."""
    rank = here.any["rank"]
    assert isinstance(rank, Rank)
    return rank


def addresses(here: Here) -> dict[str, int]:
    """Where our regions lie."""
    return {label: region.address for label, region in of(here).regions.items()}


def pid(_here: Here) -> int:
    """Process id."""
    return os.getpid()


def open_link(
    here: Here, name: str, rank: int, pids: Sequence[int], table: str, access: str,
    labels: Sequence[str], seconds: float,
) -> dict[int, bytes]:  # fmt: skip
    """Open a link; returns the offers by rank."""
    own = of(here)
    peers = {
        r: Peer(r, f"engine-{r}-{pid}", pid, None if r == rank else os.pidfd_open(pid))
        for r, pid in enumerate(pids)
    }
    group = Group(name, rank, peers, parse_rank_table(table), time.monotonic() + seconds)
    regions = [own.regions[label] for label in labels]
    link = own.links[name] = own.transport.open(group, regions, Access(access))
    return {r: link.offer(r).data for r in peers if r != rank}


def attach(here: Here, name: str, offers: dict[int, tuple[bytes, dict[str, int]]]) -> None:
    """Take the offers, and note where the regions of the peers lie."""
    own = of(here)
    for rank, (data, known) in offers.items():
        own.links[name].attach(rank, Offer(data))
        own.remote.setdefault(name, {})[rank] = known


def join(here: Here, name: str, seconds: float) -> float:
    """Join; returns how long it took."""
    began = time.monotonic()
    of(here).links[name].join(seconds)
    return time.monotonic() - began


def move(
    here: Here, name: str, rank: int, segments: Sequence[tuple[int, int, int]], write: bool = False,
    timeout: float = 10, local: str = "device", remote: str = "device",
) -> float:  # fmt: skip
    """Move segments (local offset, remote offset, bytes); returns how long it took."""
    own = of(here)
    mine, theirs = own.regions[local].address, own.remote[name][rank][remote]
    vectors = (
        array("q", [mine + segment[0] for segment in segments]),
        array("q", [theirs + segment[1] for segment in segments]),
        array("q", [segment[2] for segment in segments]),
    )
    link = own.links[name]
    began = time.monotonic()
    (link.write if write else link.read)(rank, *vectors, timeout)
    return time.monotonic() - began


def try_move(here: Here, *args: Any, **kwargs: Any) -> tuple[str, bool | None, float, str]:
    """As :func:`move`, of which a failure is expected: its type, link_usable, seconds, text."""
    began = time.monotonic()
    try:
        move(here, *args, **kwargs)
    except TransferError as error:
        here.any["flight"] = error.in_flight
        return type(error).__name__, error.link_usable, time.monotonic() - began, str(error)
    raise AssertionError("the transfer succeeded")


def settled(here: Here, seconds: float = 0.0) -> bool | None:
    """Whether what failed last has settled, within so many seconds; None if it was not in flight."""
    flight, end = here.any["flight"], time.monotonic() + seconds
    while flight is not None and not flight.settled() and time.monotonic() < end:
        time.sleep(0.01)
    return None if flight is None else bool(flight.settled())


def force(here: Here, name: str, rank: int) -> float:
    """Force what is in flight, twice; how long it took."""
    began = time.monotonic()
    for _ in range(2):
        of(here).links[name].force(rank)
    return time.monotonic() - began


def put(here: Here, label: str, data: bytes, offset: int = 0) -> None:
    """Write to one of our regions."""
    own = of(here)
    region = own.regions[label]
    source = own.transport.allocate(len(data), Placement.HOST)
    try:
        ctypes.memmove(source.address, data, len(data))
        _copy(own, region.address + offset, source.address, len(data))
    finally:
        own.transport.release(source)


def get(here: Here, label: str, size: int = SIZE, offset: int = 0) -> bytes:
    """Read one of our regions."""
    own = of(here)
    target = own.transport.allocate(size, Placement.HOST)
    _copy(own, target.address, own.regions[label].address + offset, size)
    data = ctypes.string_at(target.address, size)
    own.transport.release(target)
    return data


def _copy(own: Rank, dst: int, src: int, size: int) -> None:
    own.transport.copy(array("q", [dst]), array("q", [src]), array("q", [size]))


def exchange(here: Here, name: str, data: bytes) -> list[bytes]:
    """Swap blobs."""
    return of(here).links[name].exchange(data)


def abort(here: Here, name: str, rank: int) -> None:
    """Abort."""
    of(here).links[name].abort(rank)


def close_link(here: Here, name: str) -> tuple[list[int], float]:
    """Close a link: the ranks that it reports, and how long it took."""
    began = time.monotonic()
    ranks = of(here).links.pop(name).close()
    return sorted(ranks), time.monotonic() - began


def sim(here: Here, method: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method of the simulator in the process."""
    return getattr(of(here).sim, method)(*args, **kwargs)


def finish(here: Here) -> dict[str, int]:
    """Close everything in order; what is left then."""
    own = of(here)
    for link in own.links.values():
        link.close()
    for region in own.regions.values():
        own.transport.release(region)
    own.regions.clear()
    own.transport.close()
    return own.sim.live()


def begin_move(here: Here, *args: Any, **kwargs: Any) -> threading.Thread:
    """Start :func:`try_move` on a thread, and return when the library has the transfer."""
    own, symbol = of(here), "aclrtSynchronizeStreamWithTimeout"
    before = own.sim.calls(symbol)

    def run() -> None:
        here.any["outcome"] = try_move(here, *args, **kwargs)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: own.sim.calls(symbol) > before)
    return thread


class Ranks:
    """A test's side: nodes that are rank 0, 1, ... of links."""

    def __init__(self, nodes: list[Node], servers: int | None = None) -> None:
        self.nodes = nodes
        self.table = hccl_sim.table(len(nodes), servers)
        self._servers = servers
        self.options: dict[str, Any] = {}

    def __getitem__(self, rank: int) -> Node:
        return self.nodes[rank]

    def device_of(self, rank: int) -> int:
        """The device of a rank according to the table."""
        return parse_rank_table(self.table).device(rank).device_id

    def start(self) -> Ranks:
        """Make the transports."""
        self.all(lambda rank: (start, self.device_of(rank), self.options))
        self.pids = self.all(lambda _rank: (pid,))
        return self

    def all(self, what: Any) -> list[Any]:
        """Run ``what(rank)``, a function and its arguments, in all ranks at once."""
        for rank, node in enumerate(self.nodes):
            node.begin(*what(rank))
        return [node.result() for node in self.nodes]

    def open(
        self, name: str = "link", access: str = "read_write",
        labels: Sequence[str] = ("device", "host"), seconds: float = 20,
    ) -> None:  # fmt: skip
        """Open a link on all ranks and hand the offers on."""
        offers = self.all(
            lambda rank: (
                open_link, name, rank, self.pids, self.table, access, tuple(labels), seconds
            )
        )  # fmt: skip
        known = self.all(lambda _rank: (addresses,))
        self.all(
            lambda rank: (
                attach,
                name,
                {r: (offers[r][rank], known[r]) for r in range(len(self.nodes)) if r != rank},
            )
        )

    def link(self, name: str = "link", **options: Any) -> None:
        """Open and join."""
        self.open(name, **options)
        self.all(lambda _rank: (join, name, 20.0))

    def close(self, name: str = "link") -> list[tuple[list[int], float]]:
        """Close a link on all ranks."""
        return self.all(lambda _rank: (close_link, name))

    def sim(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Call a method of the simulator in all ranks."""
        call = functools.partial(sim, **kwargs)
        return [node.do(call, method, *args) for node in self.nodes]

    def finish(self) -> None:
        """Close everything; assert that nothing is left and nothing was done wrong."""
        for node in self.nodes:
            left = node.do(finish)
            assert not any(left.values()), left
            violations = node.do(sim, "violations")
            assert not violations, violations

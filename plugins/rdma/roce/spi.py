"""Functions for nodes: the transport by itself, without core."""

from __future__ import annotations

import ctypes
import time
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from datadist_rdma import RdmaTransport
from tests.nodes import Here

from datadist.transport import Access, Group, Offer, Peer, Placement, Region, TransportOptions

MIB = 1 << 20
GUARD = 4096


def start(here: Here, size: int = MIB, **options: Any) -> int:
    """Open the transport with one region of ``size`` bytes; returns its address."""
    here.any["transport"] = transport = RdmaTransport(TransportOptions(**options))
    here.any["region"] = region = transport.allocate(size, Placement.DEVICE)
    here.any["links"] = {}
    return region.address


def stop(here: Here) -> None:
    """Close everything."""
    transport: RdmaTransport = here.any["transport"]
    for link in here.any["links"].values():
        link.close()
    for name in [name for name in here.any if name.startswith("region")]:
        transport.release(here.any.pop(name))
    transport.close()


def register(here: Here, size: int) -> int:
    """Register an array of our own, unaligned; returns its address."""
    base = np.zeros(size + 100, np.uint8)
    here.any["array"] = base
    address = base.ctypes.data + 52
    here.any["region_array"] = here.any["transport"].register(address, size, Placement.HOST)
    return int(address)


def open_link(here: Here, name: str, rank: int, access: str, address: str | None = None) -> bytes:
    """Open a link of two ranks; returns the offer."""
    other = 1 - rank
    peers = {rank: Peer(rank, f"e{rank}"), other: Peer(other, f"e{other}", address=address)}
    group = Group(name, rank, dict(sorted(peers.items())), None, time.monotonic() + 60)
    regions: list[Region] = [v for k, v in here.any.items() if k.startswith("region")]
    link = here.any["transport"].open(group, regions, Access(access))
    here.any["links"][name] = link
    return bytes(link.offer(other).data)


def attach(here: Here, name: str, other: int, offer: bytes) -> None:
    """Take the peer's offer."""
    here.any["links"][name].attach(other, Offer(offer))


def connect(
    first: Any, second: Any, name: str = "l", access: str = "read", addresses: Any = (None, None)
) -> None:
    """Link two nodes, the first as rank 0."""
    offers = [
        node.do(open_link, name, rank, access, addresses[1 - rank])
        for rank, node in enumerate((first, second))
    ]
    first.do(attach, name, 1, offers[1])
    second.do(attach, name, 0, offers[0])


def fill(here: Here, seed: int, region: str = "region") -> None:
    """Numbers that :func:`expected` foretells."""
    memory = here.any[region]
    view = np.frombuffer((ctypes.c_char * memory.size).from_address(memory.address), np.uint8)
    view[:] = expected(seed, memory.size)


def expected(seed: int, size: int) -> Any:
    """Bytes without a period that fits pages or blocks."""
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def content(here: Here, region: str = "region") -> bytes:
    """All bytes of a region."""
    memory = here.any[region]
    return ctypes.string_at(memory.address, memory.size)


def clear(here: Here, value: int = 0, region: str = "region") -> None:
    """Set all bytes."""
    memory = here.any[region]
    ctypes.memset(memory.address, value, memory.size)


def move(
    here: Here, name: str, other: int, verb: str, local: Sequence[int], remote: Sequence[int],
    length: Sequence[int], timeout: float = 20,
) -> float:  # fmt: skip
    """Read or write segments (absolute addresses); returns the seconds it took."""
    vectors = [array("q", numbers) for numbers in (local, remote, length)]
    begun = time.monotonic()
    getattr(here.any["links"][name], verb)(other, *vectors, timeout)
    return time.monotonic() - begun


def try_move(here: Here, *args: Any) -> tuple[str, str, bool | None, float]:
    """As :func:`move`, which is to fail: error type, text, link_usable, seconds."""
    begun = time.monotonic()
    try:
        move(here, *args)
    except Exception as error:
        took = time.monotonic() - begun
        return type(error).__name__, str(error), getattr(error, "link_usable", None), took
    raise AssertionError("the transfer succeeded")


def close_link(here: Here, name: str) -> list[int]:
    """Close a link."""
    return sorted(here.any["links"].pop(name).close())


def abort_later(here: Here, name: str, other: int, delay: float) -> None:
    """Abort a link after ``delay`` seconds, from another thread."""
    import threading

    link = here.any["links"][name]
    threading.Timer(delay, lambda: link.abort(other)).start()

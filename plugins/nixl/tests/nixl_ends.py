"""A transport with one link in a process of its own, driven by a test as core would."""

from __future__ import annotations

import ctypes
import hashlib
import threading
import time
from typing import Any

import numpy as np
from datadist_nixl import NixlTransport
from numpy.typing import NDArray

from datadist.transport import (
    Access,
    Group,
    Offer,
    Peer,
    Placement,
    TransferError,
    TransportOptions,
)
from tests import hosts
from tests.nodes import Here, Node
from tests.waiting import SECONDS, until

NAME = "test"


def make(
    here: Here, rank: int, size: int, namespace: str | None, listen: str | None
) -> tuple[bytes, int]:
    """Open transport and link of two ranks; the offer, and the address of the memory."""
    if namespace is not None:
        hosts.enter(here, namespace)
    transport = NixlTransport(TransportOptions(listen_address=listen, auth_key=b"key"))
    region = transport.allocate(size, Placement.HOST)
    peer = Peer(1 - rank, f"engine-{1 - rank}")
    peer = Peer(1 - rank, peer.incarnation, connection=transport.connect(peer))
    peers = {rank: Peer(rank, f"engine-{rank}"), 1 - rank: peer}
    group = Group(NAME, rank, peers, None, time.monotonic() + 60)
    link = transport.open(group, [region], Access.READ_WRITE)
    here.any.update(transport=transport, region=region, link=link, rank=rank, peer=peer)
    return bytes(link.offer(1 - rank).data), region.address


def attach(here: Here, offer: bytes) -> None:
    """Take the peer's offer."""
    here.any["link"].attach(1 - here.any["rank"], Offer(offer))


def memory(here: Here) -> NDArray[np.uint8]:
    """Our memory."""
    region = here.any["region"]
    return np.frombuffer((ctypes.c_char * region.size).from_address(region.address), np.uint8)


def fill(here: Here, value: int) -> None:
    """Fill our memory."""
    memory(here)[:] = value


def digest(here: Here) -> str:
    """What our memory holds."""
    return hashlib.sha256(memory(here)).hexdigest()


def move(
    here: Here, verb: str, remote: int, timeout: float, repeat: int = 1
) -> tuple[str, bool, float]:
    """Move all memory, several times in one call; the error's type, whether in flight, seconds."""
    region = here.any["region"]
    vectors = [np.full(repeat, v, np.int64) for v in (region.address, remote, region.size)]
    begun = time.monotonic()
    try:
        getattr(here.any["link"], verb)(1 - here.any["rank"], *vectors, timeout)
    except TransferError as error:
        here.any["in_flight"] = error.in_flight
        return type(error).__name__, error.in_flight is not None, time.monotonic() - begun
    return "", False, time.monotonic() - begun


def begin(here: Here, verb: str, remote: int, timeout: float, repeat: int) -> None:
    """:meth:`move` in a thread; :func:`moved` tells how it ended."""

    def run() -> None:
        here.any["moved"] = move(here, verb, remote, timeout, repeat)

    here.any["moving"] = threading.Thread(target=run, daemon=True)
    here.any["moving"].start()


def moved(here: Here) -> tuple[str, bool, float]:
    """See :func:`begin`."""
    here.any["moving"].join(SECONDS)
    found: tuple[str, bool, float] = here.any["moved"]
    return found


def await_value(here: Here, value: int) -> None:
    """Until our memory ends with that value: a transfer is under way."""
    until(lambda: bool(memory(here)[-1] == value))


def settled(here: Here) -> bool:
    """Whether the transfer that failed last touches no memory any more."""
    left = here.any.get("in_flight")
    return left is None or bool(left.settled())


def force(here: Here) -> str:
    """End what is in flight; the error's type."""
    try:
        here.any["link"].force(1 - here.any["rank"])
    except TransferError as error:
        return type(error).__name__
    return ""


def lose(here: Here) -> None:
    """Core has lost the peer."""
    here.any["transport"].peer_lost(here.any["peer"])
    here.any["link"].abort(1 - here.any["rank"])


def close(here: Here) -> tuple[list[int], float]:
    """Close everything; who may still write, and the seconds that took."""
    begun = time.monotonic()
    writers = here.any["link"].close()
    here.any["transport"].disconnect(here.any["peer"])
    here.any["transport"].release(here.any["region"])
    here.any["transport"].close()
    return sorted(writers), time.monotonic() - begun


class Pair:
    """Two such processes: 0 moves, 1 owns."""

    def __init__(self, size: int, net: hosts.Network | None = None) -> None:
        self.nodes = [Node({}), Node({})]
        self.addresses = [0, 0]
        offers = []
        for rank, node in enumerate(self.nodes):
            host = net.hosts[rank] if net else None
            where: tuple[Any, Any] = (host.namespace, host.ipv4) if host else (None, None)
            offer, self.addresses[rank] = node.do(make, rank, size, *where)
            offers.append(offer)
        for rank, node in enumerate(self.nodes):
            node.do(attach, offers[1 - rank])

    def move(self, verb: str, timeout: float, repeat: int = 1) -> tuple[str, bool, float]:
        """Rank 0 reads from rank 1, or writes to it."""
        found: tuple[str, bool, float] = self.nodes[0].do(
            move, verb, self.addresses[1], timeout, repeat, timeout=timeout + 60
        )
        return found

    def begin(self, verb: str, timeout: float, repeat: int) -> None:
        """Have rank 0 begin to move; return once bytes of that arrive, again and again."""
        source, target = (1, 0) if verb == "read" else (0, 1)
        self.nodes[target].do(fill, 1)
        self.nodes[source].do(fill, 2)
        self.nodes[0].do(begin, verb, self.addresses[1], timeout, repeat)
        self.nodes[target].do(await_value, 2)

    def wait_settled(self, seconds: float) -> bool:
        """Whether what failed last settles in that time."""
        end = time.monotonic() + seconds
        while not self.nodes[0].do(settled):
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    def close(self) -> None:
        """End the processes."""
        for node in self.nodes:
            node.kill()

"""Links between messaging transports of this process, and a peer that says what it likes."""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from datadist.messaging.link import MessagingLink
from datadist.messaging.wire import OfferFields, parse_offer
from datadist.transport import (
    Access,
    Group,
    Peer,
    Placement,
    Region,
    TransferTimeout,
    TransportOptions,
)
from tests.pair_engine import PairEndpoint, PairEngine, PairTransport

FAR = 60.0
_numbers = itertools.count()


@dataclass
class Node:
    """One transport with a region, which stands for one process."""

    transport: PairTransport
    region: Region
    name: str

    @property
    def memory(self) -> memoryview:
        """The bytes of the region."""
        return memoryview(
            (ctypes.c_char * self.region.size).from_address(self.region.address)
        ).cast("B")

    def fill(self, value: int) -> None:
        """The same value everywhere."""
        self.memory[:] = bytes([value]) * self.region.size

    def on_thread(self, function: Callable[[], Any]) -> Any:
        """The result of a function on the thread of the engine."""
        return self.transport._dispatcher.loop.ask(function, FAR)


@contextmanager
def nodes(
    count: int = 2, size: int = 4 << 20, kinds: Sequence[type[PairTransport]] = (PairTransport,)
) -> Iterator[list[Node]]:
    """Transports, closed at the end."""
    with ExitStack() as stack:
        found = []
        for kind in itertools.islice(itertools.cycle(kinds), count):
            transport = kind(TransportOptions())
            stack.callback(transport.close)
            region = transport.allocate(size, Placement.HOST)
            found.append(Node(transport, region, f"engine-{next(_numbers)}"))
        yield found


def open_links(members: Sequence[Node], access: Access = Access.READ_WRITE) -> list[MessagingLink]:
    """A link per member, which nobody has attached."""
    peers = {rank: Peer(rank, node.name) for rank, node in enumerate(members)}
    name = f"link-{next(_numbers)}"
    return [
        node.transport.open(
            Group(name, rank, peers, None, time.monotonic() + FAR), [node.region], access
        )
        for rank, node in enumerate(members)
    ]


def attach_links(links: Sequence[MessagingLink]) -> None:
    """Each attaches all others."""
    for rank, other in itertools.permutations(range(len(links)), 2):
        links[rank].attach(other, links[other].offer(rank))


@contextmanager
def linked(
    members: Sequence[Node], access: Access = Access.READ_WRITE
) -> Iterator[list[MessagingLink]]:
    """Complete links, closed at the end."""
    links = open_links(members, access)
    try:
        attach_links(links)
        yield links
    finally:
        for link in links:
            link.close()


Vectors = tuple["array[int]", "array[int]", "array[int]"]


def columns(*segments: tuple[int, int, int]) -> Vectors:
    """The vectors of a read or write."""
    first, second, third = zip(*segments, strict=True)
    return array("q", first), array("q", second), array("q", third)


def whole(mine: Node, theirs: Node, size: int | None = None) -> Vectors:
    """All of a region, or its first bytes."""
    return columns((mine.region.address, theirs.region.address, size or theirs.region.size))


class Calling:
    """A call on a thread, and what it raised."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.error: BaseException | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self.error = error

    @property
    def ended(self) -> bool:
        """Whether it has returned or raised."""
        return not self._thread.is_alive()

    def result(self) -> BaseException | None:
        """What it raised, when it has ended."""
        self._thread.join(FAR)
        assert self.ended, "the call did not end"
        return self.error


def until(condition: Callable[[], object]) -> None:
    """Wait until something holds."""
    end = time.monotonic() + FAR
    while not condition():
        assert time.monotonic() < end, "it did not come to this"
        time.sleep(0.002)


class RawPeer:
    """An engine without the base: sends any bytes to another one."""

    def __init__(self) -> None:
        self._engine = PairEngine()
        self._endpoints: list[PairEndpoint] = []

    def send(self, address: bytes, *messages: bytes | bytearray) -> None:
        """Send them in this order."""
        endpoint = self._engine.connect(address)
        self._endpoints.append(endpoint)
        for message in messages:
            endpoint.send(bytearray(message), object())
        until(lambda: list(self._engine.poll()) is None or not endpoint.queue)

    def close(self) -> None:
        """Give the sockets back."""
        self._engine.close()


def offer_of(link: MessagingLink, rank: int) -> OfferFields:
    """What a link offers a rank."""
    return parse_offer(bytes(link.offer(rank).data))


def late_write(
    link: MessagingLink, mine: Node, theirs: Node, size: int, rank: int = 1
) -> TransferTimeout:
    """What a write raises of which something was sent, and that is not answered.

    A slow machine may have sent nothing of it in so short a time: then once more, with more of it.
    """
    for seconds in (0.1, 1.0, 10.0):
        with pytest.raises(TransferTimeout) as caught:
            link.write(rank, *whole(mine, theirs, size), seconds)
        if getattr(caught.value, "in_flight", None) is not None:
            return caught.value
    raise AssertionError("nothing was sent")


@contextmanager
def stuck(node: Node) -> Iterator[None]:
    """The thread of this engine does nothing."""
    go_on = threading.Event()
    reached = threading.Event()

    def wait() -> None:
        reached.set()
        go_on.wait(2 * FAR)

    node.transport._dispatcher.loop.call(wait)
    assert reached.wait(FAR)
    try:
        yield
    finally:
        go_on.set()

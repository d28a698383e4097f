"""What the transport opens on the network, and who gets an answer."""

from __future__ import annotations

import gc
import os
import time
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from datadist_ucx import UcxTransport

from datadist.messaging.ending import End
from datadist.messaging.link import MessagingLink
from datadist.messaging.wire import parse_offer, seal_offer
from datadist.transport import (
    Access,
    Group,
    LinkError,
    Offer,
    Peer,
    Placement,
    Region,
    TransferTimeout,
    TransportError,
    TransportOptions,
)

LISTEN = "0A"
LOOPBACK = "0100007F"


@pytest.fixture
def transport() -> Iterator[UcxTransport]:
    """A transport on `lo`."""
    transport = UcxTransport(TransportOptions())
    yield transport
    transport.close()


def _listeners() -> set[str]:
    """Addresses and ports, in the kernel's hexadecimal, on which this process listens."""
    own, found = _sockets(), set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in own and (fields[3] == LISTEN or table.startswith("udp")):
                found.add(fields[1])
    return found


def _sockets() -> set[str]:
    """Sockets of this process, by inode."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            found.add(target.removeprefix("socket:[").removesuffix("]"))
    return found


def _vectors(local: int, remote: int, length: int) -> tuple[array[int], array[int], array[int]]:
    """What a read or write is asked for: one segment."""
    return array("q", [local]), array("q", [remote]), array("q", [length])


def _open(
    transport: UcxTransport, rank: int, size: int = 4096, access: Access = Access.READ
) -> tuple[MessagingLink, Region]:
    region = transport.allocate(size, Placement.HOST)
    peers = {other: Peer(other, f"engine-{other}", address="127.0.0.1") for other in (0, 1)}
    group = Group("network", rank, peers, None, time.monotonic() + 30)
    return transport.open(group, [region], access), region


def test_each_transport_listens_on_two_ports_of_loopback() -> None:
    gc.collect()  # what earlier tests left listens no more
    before = _listeners()
    transport = UcxTransport(TransportOptions())
    links = [_open(transport, 0)[0] for _ in range(3)]
    new = _listeners() - before  # others may have ended meanwhile
    assert [each.partition(":")[0] for each in new] == [LOOPBACK, LOOPBACK]
    for link in links:
        link.close()
    transport.close()
    assert not new & _listeners()


def test_who_does_not_know_the_secret_gets_nothing(transport: UcxTransport) -> None:
    (asker, mine), (owner, theirs) = _open(transport, 0), _open(transport, 1)
    owner.attach(0, asker.offer(1))
    forged = replace(parse_offer(owner.offer(0).data), secret=bytes(16))
    asker.attach(1, Offer(seal_offer(forged)))
    vectors = _vectors(mine.address, theirs.address, 100)
    with pytest.raises(TransferTimeout):
        asker.read(1, *vectors, timeout=0.5)
    asker.close()
    owner.close()


def test_a_new_link_does_not_use_the_connection_of_a_session_that_one_end_has_ended(
    transport: UcxTransport,
) -> None:
    """Both endpoints of a pair are one connection: UCX drops large messages where one was closed."""
    size, other = 4 << 20, UcxTransport(TransportOptions())
    for _ in range(2):
        (asker, mine), (owner, theirs) = [
            _open(each, rank, size, Access.READ_WRITE)
            for rank, each in enumerate((transport, other))
        ]
        asker.attach(1, owner.offer(0))
        owner.attach(0, asker.offer(1))
        vectors = _vectors(mine.address, theirs.address, size)
        back = _vectors(theirs.address, mine.address, size)
        for move, rank, columns in ((asker, 1, vectors), (owner, 0, back)):
            move.read(rank, *columns, timeout=20)
            move.write(rank, *columns, timeout=20)
        asker.close()
        owner.close()
        _end_sessions(other)
    other.close()


def _end_sessions(transport: UcxTransport) -> None:
    dispatcher = transport._dispatcher
    for session in list(dispatcher._by_secret.values()):
        dispatcher.loop.ask(partial(session.end, "a test", End.TOLD), 20)


def test_a_transport_closes_its_descriptors_though_its_peer_is_connected() -> None:
    used = [_descriptors_after_closing() for _ in range(3)]
    assert used[2] <= used[0]


def _descriptors_after_closing() -> int:
    transports = [UcxTransport(TransportOptions()) for _ in range(2)]
    (asker, mine), (owner, theirs) = [_open(each, n) for n, each in enumerate(transports)]
    asker.attach(1, owner.offer(0))
    owner.attach(0, asker.offer(1))
    asker.read(1, *_vectors(mine.address, theirs.address, 4096), timeout=20)
    for link in (asker, owner):
        link.close()
    for each in transports:
        each.close()
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_offers_of_another_format_are_refused(transport: UcxTransport) -> None:
    link, _ = _open(transport, 0)
    data = link.offer(1).data
    for damaged in (b"", b"datadist ucx 1", data[:-1], data + b"."):
        with pytest.raises(LinkError, match="rank 1 is of no use"):
            link.attach(1, Offer(damaged))
    link.close()


def test_beyond_loopback_a_key_is_needed() -> None:
    options = {"device": "eth0"}
    with pytest.raises(TransportError, match="DATADIST_AUTH_KEY"):
        UcxTransport(TransportOptions(extra=options))


def test_unknown_options_and_interfaces_are_refused() -> None:
    with pytest.raises(TransportError, match=r"unknown option datadist\.ucx\.nonsense"):
        UcxTransport(TransportOptions(extra={"nonsense": "1"}))
    with pytest.raises(TransportError, match="UCX does not start on nowhere7"):
        UcxTransport(TransportOptions(auth_key=b"k", extra={"device": "nowhere7"}))

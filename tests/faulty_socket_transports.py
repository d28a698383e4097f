"""Faulty transports for what the conformance kit asks only where ``passive_target`` is False."""

from __future__ import annotations

import ctypes
import json
import os
import select
import socket
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from datadist.testing import TransportConformance
from datadist.testing.faulty_transports import FaultyTransport
from datadist.transport import (
    Access,
    AddressError,
    Capabilities,
    Group,
    Offer,
    Region,
    TransportError,
    Unsupported,
)
from tests.socket_transport import (
    GOOD,
    HEADER,
    MAGIC,
    WRITE,
    SocketLink,
    SocketTransport,
    Wire,
    _numbers,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer


class _FaultyTransport(SocketTransport):
    link_class: ClassVar[type[SocketLink]] = SocketLink

    def open(self, group: Group, regions: Sequence[Region], access: Access) -> SocketLink:
        return self.link_class(group, regions, access)


class _NoDeadlineLink(SocketLink):
    def _request(
        self, kind: bytes, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        super()._request(kind, rank, local, remote, length, timeout + 5)


class WaitsTooLong(_FaultyTransport):
    """It waits for the peer five seconds longer than it may."""

    link_class = _NoDeadlineLink


class _HoldsGilWire(Wire):
    def _fill(self, rest: memoryview) -> None:
        entry = (ctypes.c_int * 2)(self._sock.fileno(), select.POLLIN)
        ctypes.PyDLL(None).poll(ctypes.byref(entry), 1, 2000)  # PyDLL keeps the GIL
        super()._fill(rest)


class _HoldsGilLink(SocketLink):
    def _ask(self, wire: Wire, kind: bytes, local: Buffer, remote: Buffer, length: Buffer) -> bytes:
        return super()._ask(_HoldsGilWire(wire._sock, wire._deadline), kind, local, remote, length)


class WaitsWithTheGil(_FaultyTransport):
    """It waits for the peer without letting other threads run."""

    link_class = _HoldsGilLink


class _IgnoresAbortLink(SocketLink):
    def abort(self, rank: int) -> None:
        self._ended.setdefault(rank, "aborted")  # who waits is not woken


class SleepsThroughAbort(_FaultyTransport):
    """An operation that waits for the peer does not notice that it was aborted."""

    link_class = _IgnoresAbortLink


class _HalfClosedLink(SocketLink):
    def close(self) -> frozenset[int]:
        for rank in self._busy:
            self.abort(rank)
        return frozenset()


class GoesOnServing(_FaultyTransport):
    """Threads of a closed link still write what peers send."""

    link_class = _HalfClosedLink


class CallsItselfPassive(_FaultyTransport):
    """It declares that a stopped peer can be reached."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, passive_target=True)


class _TrustingLink(SocketLink):
    """The asker checks ranges and access, which the offers have; the owner checks nothing."""

    def __init__(self, group: Group, regions: Sequence[Region], access: Access) -> None:
        super().__init__(group, regions, access)
        self._offers: dict[int, tuple[bool, list[list[int]]]] = {}
        self.trusting: set[int] = set()

    def offer(self, rank: int) -> Offer:
        text = json.dumps([self._access is Access.READ_WRITE, self._spans])
        offer = super().offer(rank)
        return Offer(offer.data + text.encode(), offer.fds)

    def attach(self, rank: int, offer: Offer) -> None:
        size = len(MAGIC)
        super().attach(rank, Offer(offer.data[:size], offer.fds))
        self._offers[rank] = json.loads(offer.data[size:])

    def _request(
        self, kind: bytes, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        writable, spans = self._offers[rank]
        if rank not in self.trusting:
            if kind == WRITE and not writable:
                raise Unsupported(f"rank {rank} granted read access only")
            for address, size in zip(_numbers(remote), _numbers(length), strict=True):
                if not any(begin <= address and address + size <= end for begin, end in spans):
                    raise AddressError(f"rank {rank} did not offer {size} bytes at {address:#x}")
        super()._request(kind, rank, local, remote, length, timeout)

    def _check_request(self, kind: bytes, addresses: list[int], sizes: list[int]) -> bytes:
        return GOOD


class _CheckingLink(_TrustingLink):
    """Both check."""

    _check_request = SocketLink._check_request


class TrustsTheAsker(_FaultyTransport):
    """An owner moves whatever it is asked for."""

    link_class = _TrustingLink


def skip_checks(link: _TrustingLink, rank: int) -> None:
    """For the kit: ask this rank for anything."""
    link.trusting.add(rank)


def check_nothing(link: SocketLink, rank: int) -> None:
    """For the kit, where askers check nothing as it is."""


class TrustingSettings(TransportConformance):
    """Has the kit do without the asker's checks."""

    trusting_asker = "tests.faulty_socket_transports:skip_checks"


class CheckingSettings(TransportConformance):
    """Says that the asker checks nothing, which is not true."""

    trusting_asker = "tests.faulty_socket_transports:check_nothing"


class ChecksTwice(_FaultyTransport):
    """No fault: the owner refuses, and the asker too, which hides that from the kit."""

    link_class = _CheckingLink


class _DyingLink(SocketLink):
    def __init__(self, group: Group, regions: Sequence[Region], access: Access) -> None:
        super().__init__(group, regions, access)
        self._pidfds = [p.pidfd for p in group.peers.values() if p.pidfd is not None]
        self._thread = threading.local()

    def _check_request(self, kind: bytes, addresses: list[int], sizes: list[int]) -> bytes:
        self._thread.has_served = True
        return super()._check_request(kind, addresses, sizes)

    def _serve(self, sock: socket.socket) -> None:
        super()._serve(sock)
        if hasattr(self._thread, "has_served") and select.select(self._pidfds, [], [], 0)[0]:
            os.abort()


class DiesWithItsReader(_FaultyTransport):
    """An owner's process ends when that of a peer has ended to which it had moved bytes."""

    link_class = _DyingLink


class _NamesAllLink(SocketLink):
    def close(self) -> frozenset[int]:
        super().close()
        return frozenset(self._paths if self._access is Access.READ_WRITE else ())


class NamesAllWriters(_FaultyTransport):
    """`close` names every rank that could write, although the owner itself moves the bytes."""

    link_class = _NamesAllLink


class _EagerLink(SocketLink):
    """The bytes of a write follow the request at once, and nothing says that they are under way."""

    def _request(
        self, kind: bytes, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        try:
            super()._request(kind, rank, local, remote, length, timeout)
        except TransportError as error:
            error.in_flight = None
            raise

    def _ask(self, wire: Wire, kind: bytes, local: Buffer, remote: Buffer, length: Buffer) -> bytes:
        if kind != WRITE:
            return super()._ask(wire, kind, local, remote, length)
        sizes = _numbers(length)
        wire.send(HEADER.pack(kind, len(sizes)) + bytes(remote) + bytes(length))
        wire.send_memory(_numbers(local), sizes)
        return wire.receive(1)

    def _answer(self, wire: Wire, kind: bytes, addresses: list[int], sizes: list[int]) -> None:
        if kind != WRITE:
            super()._answer(wire, kind, addresses, sizes)
        else:
            wire.receive_memory(addresses, sizes)
            wire.send(GOOD)


class WritesArriveWhenTheOwnerGoesOn(_FaultyTransport):
    """An owner that was stopped takes bytes of a write that is over, as if it had never ended."""

    link_class = _EagerLink


FAULTY_SOCKET_TRANSPORTS = (
    FaultyTransport(WaitsTooLong, "a_stopped_peer_is_a_timeout[read]"),
    FaultyTransport(WaitsTooLong, "a_stopped_peer_is_a_timeout[write]"),
    FaultyTransport(WaitsWithTheGil, "the_gil_is_released[read]"),
    FaultyTransport(SleepsThroughAbort, "abort_ends_what_is_in_flight"),
    FaultyTransport(GoesOnServing, "nothing_is_written_after_the_owner_closed"),
    FaultyTransport(CallsItselfPassive, "a_stopped_peer_is_reached[read]"),
    FaultyTransport(TrustsTheAsker, "the_owner_itself_refuses[hidden-read]"),
    FaultyTransport(TrustsTheAsker, "the_owner_itself_refuses[hidden-write]"),
    FaultyTransport(
        TrustsTheAsker,
        "the_owner_itself_refuses[granted-write]",
        "tests.faulty_socket_transports:TrustingSettings",
    ),
    FaultyTransport(
        ChecksTwice,
        "the_owner_itself_refuses[nowhere-read]",
        "tests.faulty_socket_transports:CheckingSettings",
    ),
    FaultyTransport(DiesWithItsReader, "an_owner_outlives_its_peers[moving-read]"),
    FaultyTransport(DiesWithItsReader, "an_owner_outlives_its_peers[idle-read]"),
    FaultyTransport(NamesAllWriters, "close_names_no_rank_that_is_idle"),
    FaultyTransport(
        WritesArriveWhenTheOwnerGoesOn, "a_write_that_timed_out_lands_nowhere_later[wait]"
    ),
    FaultyTransport(WritesArriveWhenTheOwnerGoesOn, "a_write_that_was_aborted_lands_nowhere_later"),
)

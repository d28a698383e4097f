"""Faulty transports for what the conformance kit asks only where ``passive_target`` is False."""

from __future__ import annotations

import ctypes
import select
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from datadist.testing.faulty_transports import FaultyTransport
from datadist.transport import Access, Capabilities, Group, Region
from tests.socket_transport import SocketLink, SocketTransport, Wire

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


FAULTY_SOCKET_TRANSPORTS = (
    FaultyTransport(WaitsTooLong, "a_stopped_peer_is_a_timeout[read]"),
    FaultyTransport(WaitsTooLong, "a_stopped_peer_is_a_timeout[write]"),
    FaultyTransport(WaitsWithTheGil, "the_gil_is_released[read]"),
    FaultyTransport(SleepsThroughAbort, "abort_ends_what_is_in_flight"),
    FaultyTransport(GoesOnServing, "nothing_is_written_after_the_owner_closed"),
    FaultyTransport(CallsItselfPassive, "a_stopped_peer_is_reached[read]"),
)

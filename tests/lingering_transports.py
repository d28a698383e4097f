"""Transports whose transfers go on after their deadline, and say so: for the conformance kit.

One in which the kernel copies, and one whose owners move the bytes. They also declare what the other
transports of these tests do not: several transfers at a time, and reads in order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from datadist.testing.reference import ReferenceLink, ReferenceTransport
from datadist.transport import Access, Capabilities, Group, Region, TransferTimeout
from tests.socket_transport import SocketLink, SocketTransport

if TYPE_CHECKING:
    from typing_extensions import Buffer

LONGER = 2.0
"""Seconds that a transfer goes on after its deadline, at most."""


class Rest:
    """What is left of a transfer: a thread."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self._error = error

    def settled(self) -> bool:
        """Whether the thread has ended, and what it has left has settled, too."""
        left = getattr(self._error, "in_flight", None)
        return not self._thread.is_alive() and (left is None or left.settled())

    def wait(self, timeout: float) -> None:
        """Raise what the transfer raised, or that it goes on."""
        self._thread.join(timeout)
        if not self.settled():
            late = TransferTimeout(f"not complete after {timeout:g} s", link_usable=True)
            late.in_flight = self
            raise late
        if self._error is not None:
            raise self._error


class _LingeringLink(ReferenceLink):
    def _move(
        self, call: Callable[..., int], rank: int, vectors: Sequence[Buffer], timeout: float
    ) -> None:
        inner = super()._move
        Rest(lambda: inner(call, rank, vectors, timeout + LONGER)).wait(timeout)

    def force(self, rank: int) -> None:
        self.abort(rank)


class LingeringTransport(ReferenceTransport):
    """The kernel copies, and goes on after the deadline."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, parallel=4, ordered_reads=True)

    def open(self, group: Group, regions: Sequence[Region], access: Access) -> ReferenceLink:
        return _LingeringLink(group, regions, access)


class _LingeringSocketLink(SocketLink):
    def _request(
        self, kind: bytes, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        inner = super()._request
        Rest(lambda: inner(kind, rank, local, remote, length, timeout + 60)).wait(timeout)

    def force(self, rank: int) -> None:
        self._end(rank, "forced")


class LingeringSocketTransport(SocketTransport):
    """The owner moves the bytes, also those of a transfer that has timed out."""

    def open(self, group: Group, regions: Sequence[Region], access: Access) -> SocketLink:
        return _LingeringSocketLink(group, regions, access)

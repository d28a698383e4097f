"""Defects that are put into a transport, to see that a round finds them.

Each one is a function that replaces methods of a link. :func:`install` has it called for every link
that the transport opens in this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from datadist.transport import ENTRY_POINT_GROUP, PeerLost, TransferError, TransferTimeout
from tests.far_faults.settings import STOPPED_SECONDS

PIECE = 4096
PERIOD = 0.5
"""What comes late comes again and again: it is not known here when the memory is used again."""
_open: list[int] = []
_jammed = threading.Event()


def install(backend: str, defect: str) -> None:
    """Have the transport open links with this defect from now on."""
    (point,) = entry_points(group=ENTRY_POINT_GROUP, name=backend)
    transport = point.load()
    plain = transport.open

    def open_damaged(self: Any, *arguments: Any) -> Any:
        link = plain(self, *arguments)
        DEFECTS[defect](link)
        return link

    transport.open = open_damaged


def _on_failure(link: Any, name: str, react: Callable[..., None]) -> None:
    """Call ``react(error, *arguments)`` where a read or write fails; it may raise another error."""
    plain = getattr(link, name)

    def move(*arguments: Any) -> Any:
        try:
            return plain(*arguments)
        except TransferError as error:
            react(error, *arguments)
            raise

    setattr(link, name, move)


def _later(seconds: float, call: Callable[[], object]) -> None:
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()


def _again_and_again(link: Any, call: Callable[[], object]) -> None:
    """Make the call from now on until the link is closed."""
    closed, close = threading.Event(), link.close

    def once() -> None:
        if not closed.is_set():
            call()
            _later(PERIOD, once)

    def close_and_stop() -> Any:
        closed.set()
        return close()

    link.close = close_and_stop
    _later(PERIOD, once)


def _first(vector: Any) -> int:
    return int(memoryview(vector).cast("B").cast("q")[0])


def reads_land_late(link: Any) -> None:
    """A piece of a read that has failed arrives later, and nothing said so."""

    def react(error: TransferError, _rank: int, local: Any, *_: Any) -> None:
        error.in_flight = None
        address = _first(local)
        _again_and_again(link, lambda: ctypes.memset(address, 0x5A, PIECE))

    _on_failure(link, "read", react)


def writes_land_late(link: Any) -> None:
    """Pieces of a write that has failed arrive at the owner later, and nothing said so."""
    plain = link.write

    def react(error: TransferError, rank: int, local: Any, remote: Any, *_: Any) -> None:
        error.in_flight = None
        columns = [_column(_first(local)), _column(_first(remote)), _column(PIECE)]

        def again() -> None:
            with contextlib.suppress(TransferError):
                plain(rank, *columns, PERIOD)

        _again_and_again(link, again)

    _on_failure(link, "write", react)


def _column(number: int) -> memoryview:
    return memoryview(bytearray(number.to_bytes(8, "little", signed=True))).cast("q")


class _Never:
    def settled(self) -> bool:
        return False


def never_settles(link: Any) -> None:
    """What a read has left in flight does not settle."""

    def react(error: TransferError, *_: Any) -> None:
        error.in_flight = _Never()

    _on_failure(link, "read", react)
    link.force = lambda _rank: None


def notices_death_late(link: Any) -> None:
    """The loss of a peer is reported some seconds later."""

    def react(error: TransferError, *_: Any) -> None:
        if not isinstance(error, TransferTimeout):
            time.sleep(4.0)

    _on_failure(link, "read", react)


def reports_another_error(link: Any) -> None:
    """A time-out is reported as another error."""

    def react(error: TransferError, *_: Any) -> None:
        if isinstance(error, TransferTimeout):
            raise TransferError("something went wrong", link_usable=True)

    _on_failure(link, "read", react)


def hides_failures(link: Any) -> None:
    """A read that has failed returns as if all had arrived."""
    plain = link.read

    def read(*arguments: Any) -> Any:
        with contextlib.suppress(TransferError):
            return plain(*arguments)

    link.read = read


def leaks(link: Any) -> None:
    """A thread and a descriptor stay open with each link."""
    _open.append(os.open("/dev/null", os.O_RDONLY))
    threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()


def dies_with_its_peer(link: Any) -> None:
    """The process ends when a peer is lost."""
    plain = link.abort

    def abort(rank: int) -> Any:
        _later(STOPPED_SECONDS / 10, os.abort)
        return plain(rank)

    link.abort = abort


def jams(link: Any) -> None:
    """Once a read has failed, no link reads any more."""
    plain = link.read

    def read(rank: int, *arguments: Any) -> Any:
        if _jammed.is_set():
            raise PeerLost("jammed", rank)
        try:
            return plain(rank, *arguments)
        except TransferError:
            _jammed.set()
            raise

    link.read = read


DEFECTS: dict[str, Callable[[Any], None]] = {
    function.__name__: function
    for function in (
        reads_land_late, writes_land_late, never_settles, notices_death_late, reports_another_error,
        hides_failures, leaks, dies_with_its_peer, jams,
    )
}  # fmt: skip

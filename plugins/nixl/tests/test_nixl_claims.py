"""Who leads the transfers with a peer: an exception of a signal handler leaves no claim to that."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dis import opname
from types import FrameType
from typing import Any, cast

import numpy as np
import pytest
from datadist_nixl.asking import Asker
from datadist_nixl.library import HOST
from datadist_nixl.segments import Piece
from datadist_nixl.side import Side
from datadist_nixl.stream import Stream
from datadist_nixl.transfer import Transfer
from datadist_nixl.wire import GREETING_BYTES, MAX_METADATA

from datadist.transport import Access
from tests.interrupts import Interrupt, Watchdog, raising_at_jumps

ONE = np.array([64])
PIECE = Piece(ONE, ONE, ONE, (), HOST, HOST)


class Requests:
    """Ends every transfer in the first round."""

    gone: Mapping[Any, None] = {}
    unsettled = unconfirmed = False

    def __init__(self, transfers: Mapping[Transfer, None]) -> None:
        self._transfers = transfers

    def ask(self, transfer: Transfer) -> None:
        transfer.todo.clear()

    def look(self) -> bool:
        for transfer in tuple(self._transfers):
            transfer.end(None)
        return True

    def begin_again(self, reason: str, counts: bool = True) -> None:
        pass

    def begin_again_reads(self, reason: str, counts: bool = True) -> None:
        pass


def run(asker: Asker) -> None:
    """As a link does."""
    transfer = Transfer(Side(1, [], Access.READ), False, [PIECE])
    try:
        asker.run(transfer, 10)
    except BaseException:
        asker.leave(transfer)
        raise


def force(asker: Asker) -> None:
    """Of a transfer that has ended, but not settled."""
    side = Side(1, [], Access.READ)
    asker.force(side, [Transfer(side, False, [PIECE])])


@pytest.fixture
def prepare() -> Iterator[Callable[[], Asker]]:
    """Makes askers with nobody at the other end."""
    with ExitStack() as stack:

        def made() -> Asker:
            here, there = socket.socketpair()
            stack.callback(here.close)
            stack.callback(there.close)
            stream = Stream(here, MAX_METADATA)
            asker = Asker(stream, bytes(GREETING_BYTES), True, cast(Any, None), lambda _: None)
            asker._requests = cast(Any, Requests(asker._transfers))
            return asker

        yield made


@pytest.mark.parametrize("call", [run, Asker.tend, force])
def test_an_exception_leaves_no_claim(
    prepare: Callable[[], Asker], call: Callable[[Asker], object]
) -> None:
    moments = 0
    for where, asker in raising_at_jumps(prepare, call):
        moments += 1
        assert not asker._claims, where
        assert not asker._transfers, where
        run(asker)
    assert moments > 10


def test_a_second_exception_as_the_first_one_is_handled_leaves_no_claim(
    prepare: Callable[[], Asker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.10 looks for signals before the first instruction of a `finally`, and skips that then."""
    asker, struck = prepare(), list[str]()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code is not Asker.run.__code__ or struck[1:]:
            return None
        frame.f_trace_opcodes = True
        begins = opname[frame.f_code.co_code[frame.f_lasti]] != "PUSH_EXC_INFO"
        if event == "exception" or (event == "opcode" and struck and begins):
            struck.append(event)
        if struck[1:]:
            raise Interrupt
        return trace

    def look() -> bool:
        raise Watchdog

    monkeypatch.setattr(asker._requests, "look", look)
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with pytest.raises(Interrupt):
            run(asker)
    finally:
        sys.settrace(before)
    assert struck == ["exception", "opcode"]
    assert not asker._claims
    assert not asker._transfers
    monkeypatch.undo()
    run(asker)

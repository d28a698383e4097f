"""Transfers that go on after their call (link.py), where a handler of a signal raises."""

from __future__ import annotations

import time
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from datadist_shm import ShmTransport, _native, link
from datadist_shm.link import ShmLink, Unsettled

from datadist.transport import Access, Group, Peer, TransferTimeout, TransportOptions
from tests.interrupts import Interrupt, raising_anew

TIMED_OUT = _native.TIMED_OUT


class World:
    """A link whose transfers time out and go on, as native code reports that."""

    def __init__(self) -> None:
        self.transport = ShmTransport(TransportOptions())
        peers = {0: Peer(0, "us"), 1: Peer(1, "them")}
        self.link = self.transport.open(
            Group("pair", 0, peers, None, time.monotonic() + 60), [], Access.READ_WRITE
        )
        assert isinstance(self.link, ShmLink)
        self.path = self.link._paths[1]
        self.path.open = True
        fence: Any = SimpleNamespace(address=0)
        self.path.fence = fence
        self.begun: list[object] = []

    def close(self) -> None:
        self.path.fence = None
        self.link.close()
        self.transport.close()


def _flights(error: BaseException | None) -> list[Any]:
    found = []
    while error is not None:
        flight = getattr(error, "in_flight", None)
        found += [] if flight is None else [flight]
        error = error.__context__
    return found


@pytest.mark.parametrize("write", [False, True])
def test_the_exception_says_what_goes_on_wherever_a_handler_raises(
    monkeypatch: pytest.MonkeyPatch, write: bool
) -> None:
    over: set[int] = set()
    current: list[World] = []
    caught: list[BaseException] = []

    def transfer(*arguments: Any) -> tuple[int, int, int]:
        current[-1].begun = arguments[-1]
        arguments[-1].append(object())  # from here on it goes on
        return TIMED_OUT, 0, 0

    def prepare() -> World:
        current.append(World())
        return current[-1]

    def call(world: World) -> None:
        vector = array("q", [8])
        operate = world.link.write if write else world.link.read
        try:
            operate(1, vector, vector, vector, 1.0)
        except TransferTimeout as error:
            caught[:] = [error]
        except Interrupt as error:
            caught[:] = [error]
            raise

    monkeypatch.setattr(link, "transfer", transfer)
    monkeypatch.setattr(_native, "settled", lambda flight: id(flight) in over)
    moments = 0
    for where, world in raising_anew(prepare, call):
        for flight in world.begun:
            moments += 1
            (unsettled,) = set(_flights(caught[0])) or pytest.fail(f"{where}: it is lost")
            assert not unsettled.settled()
            over.add(id(flight))
            assert unsettled.settled()
            assert not any(each._flight is flight for each in Unsettled._all), where
        assert not world.path.inside
        world.close()
        caught.clear()
    assert moments > 8

"""What moves segments (transfer.py): transfers that go on are kept, wherever a signal handler raises."""

from __future__ import annotations

import logging
import threading
from array import array
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from datadist.caches.block_ranges import BlockRanges
from datadist.caches.quarantine import Quarantine
from datadist.links.counters import Counters
from datadist.links.permits import Permits
from datadist.status import LLMException, LLMStatusCode
from datadist.transfers.limits import CallLimit
from datadist.transfers.resolve import Route
from datadist.transfers.transfer import Transfers
from datadist.transport import TransferTimeout
from tests.interrupts import raising_anew

FAR = 1e9
_VECTORS = array("q", [4096, 64]), array("q", [8, 8])


class Flight:
    """Goes on until the test says otherwise."""

    def __init__(self) -> None:
        self.over = False

    def settled(self) -> bool:
        return self.over


class World:
    """One link to one rank, whose transfers time out and go on."""

    def __init__(self, like: World | None = None) -> None:
        self.flight = Flight()
        self.begun = False
        """Whether the transport has left a transfer."""
        self.error = TransferTimeout("it takes too long", link_usable=True)
        self.error.in_flight = self.flight
        self.quarantine: Quarantine = Quarantine() if like is None else like.quarantine
        self.prolonged: set[int] = set()
        view = SimpleNamespace(prolong=self.prolonged.add, end_pull=self.prolonged.discard)
        self.attempt = SimpleNamespace(
            permits={1: Permits()}, gone={}, dead=False, counters={1: Counters()},
            link=SimpleNamespace(read=self.operate, write=self.operate),
            members={1: SimpleNamespace(cluster_id=7)},
        )  # fmt: skip
        self.route = cast(
            "Route",
            SimpleNamespace(attempt=self.attempt, rank=1, view=view, domain="a link"),
        )
        nothing: Any = None
        self.transfers = Transfers(3, FAR, list, {}, lambda *_: True, nothing, self.quarantine)

    def operate(self, *_: object) -> None:
        self.begun = True
        raise self.error

    @staticmethod
    def segments() -> Any:
        local, length = _VECTORS
        return SimpleNamespace(local=local, remote=array("q", [0, 0]), length=length, nbytes=16)

    def move(self, write: bool) -> None:
        limit = CallLimit(FAR).begin(0)
        with pytest.raises(LLMException) as raised:
            self.transfers.move(self.route, self.segments(), limit, write=write)
        assert raised.value.status_code is LLMStatusCode.LLM_TIMEOUT

    def is_kept(self) -> bool:
        return all(self.quarantine.touching(BlockRanges((base,), 1)) for base in (4096, 64))


@pytest.mark.parametrize("write", [False, True])
def test_a_transfer_that_goes_on_is_kept_wherever_a_handler_raises(write: bool) -> None:
    moments = 0
    for where, world in raising_anew(World, partial(World.move, write=write)):
        moments += world.begun
        assert not world.begun or world.is_kept(), where
        assert world.attempt.permits[1].count == 1
        world.flight.over = True
        world.quarantine.release_settled()
        assert not world.prolonged, f"{where}: the peer is never told that we have stopped"
    assert moments > 20


def test_what_an_earlier_call_left_is_not_kept_again_for_another() -> None:
    """A program tries again while it handles the first error, which is then the context of the second."""
    world = World()
    world.move(write=False)
    other = World()
    other.error = TransferTimeout("too long again", link_usable=True)
    world.flight.over = True
    try:
        raise world.error
    except TransferTimeout:
        other.move(write=False)
    assert other.quarantine.touching(BlockRanges((4096,), 1)) is None


def test_a_failure_while_an_earlier_one_is_handled_keeps_nothing_at_another_peer() -> None:
    """The second call's error has the first one's as its context."""
    first = World()
    other = World(first)
    other.error = TransferTimeout("it was not even begun", link_usable=True)
    try:
        first.transfers.move(first.route, first.segments(), CallLimit(FAR).begin(0), write=True)
    except LLMException:
        other.move(write=True)
    assert first.prolonged
    assert not other.prolonged
    first.flight.over = True
    first.quarantine.release_settled()
    assert not first.prolonged


class SettlesSoon(Flight):
    """Goes on when it is asked for the first time, and no more at the second time."""

    def settled(self) -> bool:
        over, self.over = self.over, True
        return over


def test_what_settles_while_a_handler_raises_is_told_to_the_peer() -> None:
    def prepare() -> World:
        world = World()
        world.flight = world.error.in_flight = SettlesSoon()
        return world

    for where, world in raising_anew(prepare, partial(World.move, write=True)):
        world.quarantine.release_settled()
        assert not world.prolonged, where


def test_interrupted_calls_leave_no_lock_of_a_log_taken() -> None:
    for _ in raising_anew(World, partial(World.move, write=False)):
        logged = threading.Thread(target=logging.getLogger("datadist.transfer").warning, args=("",))
        logged.start()
        logged.join(60)
        assert not logged.is_alive()

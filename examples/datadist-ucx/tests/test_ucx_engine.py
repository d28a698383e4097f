"""The engine without the base: two of them in this process, which take turns."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from datadist_ucx import UcxTransport
from datadist_ucx.engine import UcxEngine

from datadist.messaging import Arrived, Completed, Endpoint, EngineEvent, Lost
from datadist.transport import TransportOptions

SECONDS = 60
SMALL, LARGE = 40, 2 << 20
ROUNDS = 5


@pytest.fixture
def engines() -> Iterator[tuple[UcxEngine, UcxEngine]]:
    """Two engines on `lo`."""
    with ExitStack() as stack:
        both = _engine(), _engine()
        for engine in both:
            stack.callback(engine.close)
        yield both


def _engine() -> UcxEngine:
    transport = UcxTransport.__new__(UcxTransport)
    return transport.make_engine(TransportOptions())


class _Ends:
    """Polls engines, and remembers what has happened."""

    def __init__(self, *engines: UcxEngine) -> None:
        self._engines = engines
        self.arrived: list[int] = []
        """Sizes."""
        self.completed: list[object] = []
        self.lost: list[Endpoint] = []

    def poll_until(self, done: Callable[[], bool]) -> None:
        """Poll until something is so."""
        end = time.monotonic() + SECONDS
        while not done():
            assert time.monotonic() < end, f"arrived {self.arrived}, completed {self.completed}"
            for engine in self._engines:
                for event in engine.poll():
                    self._note(event)

    def _note(self, event: EngineEvent) -> None:
        if isinstance(event, Arrived):
            self.arrived.append(len(memoryview(event.message)))
        elif isinstance(event, Completed):
            assert event.error is None, event.error
            self.completed.append(event.token)
        elif isinstance(event, Lost):
            self.lost.append(event.endpoint)


def test_what_one_end_closes_takes_nothing_from_the_other(
    engines: tuple[UcxEngine, UcxEngine],
) -> None:
    """UCX makes a pair of the first endpoints of two workers, as of the second ones."""
    mine, theirs = engines
    ends = _Ends(mine, theirs)
    for number in range(1, ROUNDS + 1):
        closed, used = theirs.connect(mine.address), mine.connect(theirs.address)
        used.send(bytearray(LARGE), "used")
        closed.send(bytearray(SMALL), "closed")
        closed.close()
        ends.poll_until(lambda wanted=number: ends.arrived.count(LARGE) == wanted)  # type: ignore[misc]
        used.send(bytearray(LARGE + 1), "used")
        ends.poll_until(lambda wanted=number: ends.arrived.count(LARGE + 1) == wanted)  # type: ignore[misc]
        used.close()
    assert not ends.lost


def test_the_end_of_a_peer_is_known_to_all_endpoints_of_it(
    engines: tuple[UcxEngine, UcxEngine],
) -> None:
    mine, theirs = engines
    third = _engine()
    endpoints = [mine.connect(third.address) for _ in range(2)]
    other = mine.connect(theirs.address)
    ends = _Ends(mine, theirs, third)
    for endpoint in (*endpoints, other):
        endpoint.send(bytearray(SMALL), None)
    ends.poll_until(lambda: len(ends.arrived) == 3)
    third.close()
    left = _Ends(mine, theirs)
    left.poll_until(lambda: all(endpoint.problem() for endpoint in endpoints))
    assert other.problem() is None
    mine.connect(theirs.address).send(bytearray(SMALL), "again")
    left.poll_until(lambda: left.arrived == [SMALL])


def test_little_is_left_of_peers_that_have_come_and_gone(
    engines: tuple[UcxEngine, UcxEngine],
) -> None:
    """The connection to the last one, until another one is made."""
    stays, used = engines[0], []
    for _ in range(ROUNDS):
        comes = _engine()
        _exchange(stays, comes)
        gc.collect()
        used.append(len(os.listdir("/proc/self/fd")))
    assert used[-1] <= used[1], used


def _exchange(stays: UcxEngine, comes: UcxEngine) -> None:
    """Send a large message each way; then one of both ends."""
    ends = _Ends(stays, comes)
    there, back = stays.connect(comes.address), comes.connect(stays.address)
    for endpoint in (there, back):
        endpoint.send(bytearray(LARGE), None)
    ends.poll_until(lambda: ends.arrived == [LARGE, LARGE])
    back.close()
    comes.close()
    _Ends(stays).poll_until(lambda: there.problem() is not None)
    there.close()

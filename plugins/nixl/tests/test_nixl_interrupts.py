"""Exceptions of signal handlers at any moment of a transfer."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from types import FrameType

import nixl_skips
import numpy as np
import pytest
from nixl_local import End, linked

pytestmark = nixl_skips.needed

SIZE = 1 << 20
INTERRUPTS = 60


class Interrupt(Exception):
    """Raised by the handler."""


@pytest.fixture
def alarm() -> Iterator[list[bool]]:
    """The handler raises while the only item is True."""
    armed = [False]

    def raising(_signal: int, _frame: FrameType | None) -> None:
        if armed[0]:
            armed[0] = False
            raise Interrupt

    with ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, raising))
        stack.callback(signal.setitimer, signal.ITIMER_REAL, 0)
        yield armed


@pytest.mark.parametrize("verb", ["read", "write"])
def test_the_link_goes_on_and_every_transfer_is_whole(alarm: list[bool], verb: str) -> None:
    rng = random.Random(7)
    interrupted = 0
    with linked(SIZE) as (one, two):
        one.move(verb, two, [(0, 0, 64)])
        for number in range(INTERRUPTS):
            interrupted += _interrupt(alarm, one, two, verb, rng)
            _check(one, two, verb, number)
    assert interrupted > INTERRUPTS // 10


def _interrupt(alarm: list[bool], one: End, two: End, verb: str, rng: random.Random) -> bool:
    size = rng.choice([64, 65536, SIZE])
    try:
        alarm[0] = True
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.00002, 0.002))
        one.move(verb, two, [(0, 0, size)])
    except Interrupt as error:
        left, end = getattr(error, "in_flight", None), time.monotonic() + 30
        while left is not None and not left.settled():
            assert time.monotonic() < end, "it stays in flight"
            time.sleep(0.001)
        return True
    finally:
        alarm[0] = False
    return False


def _check(one: End, two: End, verb: str, number: int) -> None:
    source, target = (two, one) if verb == "read" else (one, two)
    source.bytes[:] = number % 251
    target.bytes[:] = 255
    one.move(verb, two, [(0, 0, SIZE // 2)])
    assert (target.bytes[: SIZE // 2] == number % 251).all()
    assert (target.bytes[SIZE // 2 :] == 255).all(), np.flatnonzero(target.bytes != 255)[-1]

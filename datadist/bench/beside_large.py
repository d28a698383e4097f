"""Small pulls and messages while large pulls of the same pair go on, and alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from datadist.bench.measure import Pair, Progress, pair, pool_for
from datadist.bench.measured_engine import OWN, PEER, Settings
from datadist.bench.results import BesideLarge
from datadist.bench.shapes import ONE_BLOCK, Shape

PAUSE = 0.001
"""Seconds from one small pull, or message, to the next: a program that now and then has some."""
MESSAGE_BYTES = 64
RATE_MESSAGES = 20_000


def beside_large(settings: Settings, shape: Shape, count: int, progress: Progress) -> BesideLarge:
    """``count`` small pulls, and as many messages each way, alone and beside large pulls."""
    progress("start two engines")
    with pair(settings, pool_for(settings, shape, ONE_BLOCK)) as both:
        ids = _prepare(both, shape)
        result = BesideLarge("small", shape.nbytes)
        progress("messages, as many as go")
        result.messages_per_second = _rate(both, count)
        for beside in (False, True):
            progress("beside large pulls" if beside else "alone")
            with _large_pulls(both, shape, ids["large"], result.large if beside else None):
                result.pulls.append(_small_pulls(both, ids["small"], count))
                result.out.append(_messages(both, count, inward=False))
                result.inward.append(_messages(both, count, inward=True))
        return result


def _prepare(both: Pair, shape: Shape) -> dict[str, int]:
    ids = {}
    for label, form in (("large", shape), ("small", ONE_BLOCK)):
        pull = both.settings.direction == "pull"
        ids[label] = both.peer.call("make", label, form, pull)
        both.own.make(label, form, not pull)
    both.link()
    for label, form in (("large", shape), ("small", ONE_BLOCK)):
        both.own.move(label, form, PEER, ids[label], form.lists(0))
    return ids


@contextmanager
def _large_pulls(
    both: Pair, shape: Shape, cache_id: int, seconds: list[float] | None
) -> Iterator[None]:
    """One after another on a thread, until the block is left; none without ``seconds``."""
    over = threading.Event()

    def pull() -> None:
        assert seconds is not None
        number = 0
        while not over.is_set():
            number += 1
            lists = shape.lists(number % 16)
            seconds.append(both.own.move("large", shape, PEER, cache_id, lists))

    thread = threading.Thread(target=pull)
    if seconds is not None:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if seconds is not None:
            thread.join()


def _small_pulls(both: Pair, cache_id: int, count: int) -> list[float]:
    seconds = []
    for number in range(count):
        time.sleep(PAUSE)
        lists = ([number % ONE_BLOCK.blocks], [(number + 1) % ONE_BLOCK.blocks])
        seconds.append(both.own.move("small", ONE_BLOCK, PEER, cache_id, lists))
    return seconds


def _messages(both: Pair, count: int, inward: bool) -> list[float]:
    """Seconds from the call that sends to the return of the one that takes, in the other process."""
    if inward:
        both.peer.begin("send_paced", OWN, count, MESSAGE_BYTES, PAUSE)
        seconds = both.own.receive(count)
        both.peer.result()
        return seconds
    both.peer.begin("receive", count)
    both.own.send_paced(PEER, count, MESSAGE_BYTES, PAUSE)
    return list(both.peer.result())


def _rate(both: Pair, count: int) -> float:
    many = max(count, min(RATE_MESSAGES, 10 * count))
    both.peer.begin("receive", many)
    began = time.perf_counter()
    both.own.send_paced(PEER, many, MESSAGE_BYTES, 0.0)
    both.peer.result()
    return many / (time.perf_counter() - began)

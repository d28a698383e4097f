"""Transfers with one peer at the same time: two large ones, and a small one beside a large one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from datadist.bench.measure import Pair, Progress, pair, pool_for
from datadist.bench.measured_engine import PEER, Settings
from datadist.bench.results import Parallel, Series
from datadist.bench.shapes import ONE_BLOCK, Shape

SMALL = 200
"""Small transfers per round that are measured alone."""


def parallel(settings: Settings, shape: Shape, repeat: int, progress: Progress) -> Parallel:
    """``repeat`` rounds: two large transfers one after another, both at once, small ones beside one."""
    progress("start two engines")
    with pair(settings, pool_for(settings, shape, shape, shape, ONE_BLOCK)) as both:
        moves = _prepare(both, shape)
        small = moves.pop()
        result = Parallel("parallel", shape.nbytes, Series(), Series(), [], [], Series(), [])
        for number in range(repeat):
            progress(f"round {number + 1} of {repeat}")
            result.sequential.add(_timed(lambda n=number: [move(n) for move in moves]))  # type: ignore[misc]
            result.together.add(_timed(lambda n=number: _at_once(moves, n)))  # type: ignore[misc]
            result.alone += [small(n) for n in range(SMALL)]
            large, seconds = _beside(moves[0], small, number)
            result.large.add(large)
            result.beside += seconds
        if settings.direction == "pull":
            for label in ("first", "second"):
                both.own.clear(label)
            _at_once(moves, repeat)
            for label in ("first", "second"):
                result.problems += both.own.problems(label, shape, shape.lists(repeat))
        return result


Move = Callable[[int], float]
"""Transfers the lists of that number; returns the seconds."""


def _prepare(both: Pair, shape: Shape) -> list[Move]:
    """Two large transfers with caches of their own at our end, and a small one; over one link."""
    pull = both.settings.direction == "pull"
    caches = [("first", shape, "large"), ("second", shape, "large"), ("small", ONE_BLOCK, "small")]
    moves = list[Move]()
    theirs: dict[str, int] = {}
    for label, form, peers in caches:
        if peers not in theirs:
            theirs[peers] = both.peer.call("make", peers, form, pull)
        both.own.make(label, form, not pull)
    both.link()
    for label, form, peers in caches:

        def move(number: int, label: str = label, form: Shape = form, peers: str = peers) -> float:
            return both.own.move(label, form, PEER, theirs[peers], form.lists(number))

        move(0)  # known from now on
        moves.append(move)
    return moves


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _at_once(moves: list[Move], number: int) -> None:
    threads = [threading.Thread(target=move, args=(number,)) for move in moves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _beside(large: Move, small: Move, number: int) -> tuple[float, list[float]]:
    """Seconds of a large transfer, and of the small ones that ended while it went on."""
    took, seconds = list[float](), list[float]()
    thread = threading.Thread(target=lambda: took.append(large(number)))
    thread.start()
    while not took:
        one = small(len(seconds))
        if not took:
            seconds.append(one)
        time.sleep(0.0005)
    thread.join()
    return took[0], seconds

"""Curves: how time grows with the size and number of segments, with domains and with clusters."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from datadist.bench.limits import Limits
from datadist.bench.measure import Pair, Progress, limits_of, pair, pool_for
from datadist.bench.measured_engine import OWN, PEER, RemoteEngine, Settings
from datadist.bench.results import ScalePoint, Series
from datadist.bench.shapes import MIB, Shape
from datadist.transfers.block_lists import Blocks

SIZES = [512 << n for n in range(14)]
"""512 B to 4 MiB."""
COUNTS = [1 << n for n in range(18)]
"""1 to 131,072."""
DOMAINS = [1, 8, 64, 512]
CLUSTERS = [2, 3, 4]


def scale(
    settings: Settings, repeat: int, threads: int, quick: bool, progress: Progress
) -> Iterator[ScalePoint]:
    """Every point, as it is measured."""
    total = (16 if quick else 128) * MIB
    for size in SIZES[::3] if quick else SIZES:
        shape = Shape(
            "segment-bytes", f"{size} B", 1, max(2, 2 * total // size), size, total // size
        )
        progress(f"segments of {size} B")
        yield _curve_point(settings, shape, size, repeat, threads)
    for name in ("segments", "segments-array"):  # lists of blocks as lists, and as NumPy arrays
        for count in COUNTS[:12:3] if quick else COUNTS:
            shape = Shape(name, f"{count} segments of 1 KiB", 1, 2 * count, 1024, count)
            progress(f"{name}: {count} of 1 KiB")
            yield _curve_point(settings, shape, count, repeat, threads)
    for count in DOMAINS[:2] if quick else DOMAINS:
        progress(f"{count} domains")
        yield _domains(settings, count)
    for count in CLUSTERS[:2] if quick else CLUSTERS:
        progress(f"{count} clusters")
        yield _clusters(settings, count, repeat)


def _curve_point(settings: Settings, shape: Shape, x: int, repeat: int, threads: int) -> ScalePoint:
    pull = settings.direction == "pull"
    with pair(settings, pool_for(settings, shape)) as both:
        both.peer.begin("make", "cache", shape, pull)
        both.own.make("cache", shape, not pull)
        cache_id = both.peer.result()
        both.link()
        point = ScalePoint(shape.name, x, Series(), shape.nbytes, Series(), Series())
        with limits_of(both, shape, threads) as yardsticks:
            point.limit_name = yardsticks.compared
            both.own.move("cache", shape, PEER, cache_id, _blocks(shape, 0))
            for number in range(repeat):
                _measure(both, shape, cache_id, number, point, yardsticks)
        return point


def _measure(
    both: Pair, shape: Shape, cache_id: int, number: int, point: ScalePoint, limits: Limits
) -> None:
    """One transfer with its reference copy, and another one to measure the time outside the transport."""
    lists = _blocks(shape, number)
    assert point.limit is not None
    assert point.prepare is not None
    point.limit.add(limits.measure(limits.compared, number))
    point.seconds.add(both.own.move("cache", shape, PEER, cache_id, lists))
    with both.timed_transport() as spent:
        whole = both.own.move("cache", shape, PEER, cache_id, lists)
    point.prepare.add(whole - spent[-1])


def _blocks(shape: Shape, number: int) -> tuple[Blocks, Blocks]:
    source, target = shape.lists(number)
    if shape.name == "segments-array":
        return np.array(source), np.array(target)
    return source, target


def _domains(settings: Settings, count: int) -> ScalePoint:
    """Seconds until ``count`` domains between two engines are OK, linked at once."""
    with pair(settings, 64 * MIB) as both:
        names = [f"domain-{n}" for n in range(count)]
        began = time.perf_counter()
        both.peer.begin("link_many", names, 2)
        both.own.link_many(names, 2)
        seconds = time.perf_counter() - began
        both.peer.result()
        return ScalePoint("domains", count, Series([seconds]))


def _clusters(settings: Settings, count: int, repeat: int) -> ScalePoint:
    """Seconds until all of ``count`` - 1 clusters have moved as many bytes, all at the same time."""
    shape = Shape("clusters", f"{count} clusters", 8, 512, 65536, 128)
    pull = settings.direction == "pull"
    sides = {cluster: RemoteEngine(cluster, settings) for cluster in range(1, count + 1)}
    try:
        _on_all(sides, "start", pool_for(settings, shape))
        owner_id = sides[PEER].call("make", "cache", shape, pull)
        for cluster in range(OWN, count + 1):
            sides[cluster].call("make", "cache", shape, not pull)
        comm_ids = {c: side.call("link", "clusters", count) for c, side in sides.items()}
        for cluster, side in sides.items():
            side.call("wait", comm_ids[cluster])
        movers = {c: side for c, side in sides.items() if c != PEER}
        _on_all(movers, "move_many", "cache", shape, PEER, owner_id, 1)
        seconds = Series()
        for _ in range(repeat):
            began = time.perf_counter()
            _on_all(movers, "move_many", "cache", shape, PEER, owner_id, 4)
            seconds.add(time.perf_counter() - began)
        return ScalePoint("clusters", count, seconds, 4 * (count - 1) * shape.nbytes)
    finally:
        for side in sides.values():
            side.close()


def _on_all(sides: dict[int, RemoteEngine], method: str, *args: object) -> None:
    for side in sides.values():
        side.begin(method, *args)
    for side in sides.values():
        side.result()

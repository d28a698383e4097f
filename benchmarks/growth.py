"""How time and memory grow with engines, domains, keys, grants and blocks.

`python benchmarks/growth.py` prints a table for each curve: the number, the time in all, and the time and
memory per unit. Where they are linear, the last two columns stay as they are, or fall. Arguments name
curves; `--plot FILE.png` draws them.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from datadist import BlocksCacheKey, CacheDesc, CacheKey, DataType, Placement
from datadist.base.quiet import quiet
from datadist.bench.grants import GrantingEngine
from datadist.bench.measure import pair, pool_for
from datadist.bench.measured_engine import PEER, RemoteEngine, Settings, model_of, table
from datadist.bench.shapes import MIB, Shape
from datadist.cli.tables import render

SETTINGS = Settings("shm")
ROUNDS = 200
"""Pulls of each engine from each other one."""
SLOTS = 1000
"""Keys of one cache."""
SLOT_BYTES = 64
POOL = 64 * MIB


@dataclass(frozen=True)
class Point:
    """One measurement: ``seconds`` for ``number`` units, and bytes of memory for them, if known."""

    number: int
    seconds: float
    nbytes: float | None = None


def resident() -> int:
    """Bytes of memory of this process that are its own: not those of pools, which are shared."""
    _, whole, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(whole) - int(shared)) * resource.getpagesize()


class GrowingEngine(GrantingEngine):
    """An engine of a curve; methods are called by name in its process."""

    def resident(self) -> int:
        """:func:`resident` of this process."""
        return resident()

    def link_pairs(self, clusters: int) -> None:
        """Link with each of the others, by a domain of two."""
        comm_ids = []
        for other in range(1, clusters + 1):
            if other != self.cluster:
                low, high = sorted((self.cluster, other))
                comm_ids.append(self.engine.link(f"pair-{low}-{high}", {low: 0, high: 1}, table(2)))
        for comm_id in comm_ids:
            self.wait(comm_id)

    def pull_from_all(self, clusters: int, shape: Shape) -> float:
        """Pull a block from each of the others, in turns; the seconds."""
        manager, cache = self.engine.cache_manager, self.caches["target"]
        keys = [
            BlocksCacheKey(n, model_of(shape)) for n in range(1, clusters + 1) if n != self.cluster
        ]
        began = time.perf_counter()
        for number in range(ROUNDS):
            for key in keys:
                manager.pull_blocks(key, cache, [number % shape.blocks], [1])
        return time.perf_counter() - began

    def bind(self, keys: int) -> float:
        """Allocate caches with as many keys, :data:`SLOTS` each; the seconds."""
        manager, began = self.engine.cache_manager, time.perf_counter()
        for start in range(0, keys, SLOTS):
            slots = min(SLOTS, keys - start)
            manager.allocate_cache(
                CacheDesc(1, [slots, SLOT_BYTES], DataType.DT_UINT8, Placement.DEVICE),
                [CacheKey(self.cluster, start + n) for n in range(slots)],
            )
        return time.perf_counter() - began


def engines(counts: list[int]) -> Iterator[tuple[str, Point]]:
    """All pairs of so many engines: linking, and pulls of 4 KiB by all at once."""
    shape = Shape("growth", "blocks of 4 KiB", 1, 64, 4096, 1)
    for count in counts:
        with ExitStack() as stack:
            sides = []
            for cluster in range(1, count + 1):
                sides.append(RemoteEngine(cluster, SETTINGS, GrowingEngine))
                stack.callback(sides[-1].close)
            _all(sides, "start", pool_for(SETTINGS, shape, shape))
            _all(sides, "make", "source", shape, True)
            _all(sides, "make", "target", shape, False)
            before = sum(_all(sides, "resident"))
            began = time.perf_counter()
            _all(sides, "link_pairs", count)
            seconds = time.perf_counter() - began
            links = count * (count - 1)
            yield "links of engines", Point(links, seconds, sum(_all(sides, "resident")) - before)
            _all(sides, "pull_from_all", count, shape)
            began = time.perf_counter()
            _all(sides, "pull_from_all", count, shape)
            yield "pulls of engines", Point(links * ROUNDS, time.perf_counter() - began)


def domains(counts: list[int]) -> Iterator[tuple[str, Point]]:
    """Domains between two engines, linked at once and left one by one."""
    for count in counts:
        with pair(SETTINGS, POOL) as both:
            both.link("first")
            before, began = resident(), time.perf_counter()
            names = [f"domain-{n}" for n in range(count)]
            both.peer.begin("link_many", names, 2)
            both.own.link_many(names, 2)
            seconds = time.perf_counter() - began
            yield "domains", Point(count, seconds, resident() - before)
            both.peer.result()


def keys(counts: list[int]) -> Iterator[tuple[str, Point]]:
    """Keys of requests: bound by their owner, and known to a peer that is linked."""
    for count in counts:
        with pair(SETTINGS, POOL, GrowingEngine) as both:
            both.link()
            manager = both.own.engine.cache_manager
            desc = CacheDesc(1, [1, SLOT_BYTES], DataType.DT_UINT8, Placement.DEVICE)
            target = manager.allocate_cache(desc)
            before, theirs, began = resident(), both.peer.call("resident"), time.perf_counter()
            bound = both.peer.call("bind", count)
            manager.pull_cache(CacheKey(PEER, count - 1), target)  # waits until it is known here
            seconds = time.perf_counter() - began
            yield "keys, bound", Point(count, bound, both.peer.call("resident") - theirs)
            yield "keys, known to a peer", Point(count, seconds, resident() - before)


def grants(counts: list[int]) -> Iterator[tuple[str, Point]]:
    """Live grants of 16 blocks: granting, and revoking."""
    shape = Shape("grants", "blocks of 4 KiB", 1, 1024, 4096, 16)
    for count in counts:
        with pair(SETTINGS, pool_for(SETTINGS, shape), GrowingEngine) as both:
            both.peer.call("make", "cache", shape, True)
            both.link()
            granted, revoked, nbytes = both.peer.call("live", "cache", count, list(range(16)))
            yield "grants", Point(count, granted * count, nbytes * count)
            yield "grants, revoked", Point(count, revoked * count)


def blocks(counts: list[int]) -> Iterator[tuple[str, Point]]:
    """Blocks of 64 bytes in one pull, by random lists."""
    for count in counts:
        shape = Shape("blocks", "blocks of 64 bytes", 1, 2 * count, 64, count)
        with pair(SETTINGS, pool_for(SETTINGS, shape)) as both:
            both.peer.begin("make", "cache", shape, True)
            both.own.make("cache", shape, False)
            cache_id = both.peer.result()
            both.link()
            both.own.move("cache", shape, PEER, cache_id, shape.lists(0))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            whole = min(
                both.own.move("cache", shape, PEER, cache_id, shape.lists(n)) for n in range(5)
            )
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
            with both.timed_transport() as spent:
                with_link = both.own.move("cache", shape, PEER, cache_id, shape.lists(9))
            yield "blocks of one pull", Point(count, whole, grown)
            yield "blocks of one pull, core", Point(count, with_link - spent[-1])


CURVES: dict[str, tuple[Callable[[list[int]], Iterator[tuple[str, Point]]], list[int]]] = {
    "engines": (engines, [2, 4, 8, 16]),
    "domains": (domains, [1, 8, 64, 511]),
    "keys": (keys, [100, 1000, 10_000, 100_000]),
    "grants": (grants, [10, 100, 1000, 10_000]),
    "blocks": (blocks, [100, 1000, 10_000, 100_000, 1_000_000]),
}


def _all(sides: list[RemoteEngine], method: str, *args: object) -> list[int]:
    for side in sides:
        side.begin(method, *args)
    return [side.result() for side in sides]


def _rows(points: list[Point]) -> list[tuple[str, ...]]:
    return [
        (
            str(p.number),
            f"{p.seconds * 1e3:.3f}",
            f"{p.seconds / p.number * 1e6:.3f}",
            "" if p.nbytes is None else f"{p.nbytes / p.number:.0f}",
        )
        for p in points
    ]


def _print(curves: dict[str, list[Point]]) -> None:
    for name, points in curves.items():
        print(f"\n{name}\n" + render(("number", "ms", "us each", "bytes each"), _rows(points)))


def _plot(curves: dict[str, list[Point]], path: Path) -> None:
    """Time per unit over the number of units."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axis = figure.subplots()
    for name, points in curves.items():
        each = [p.seconds / p.number * 1e6 for p in points]
        axis.loglog([p.number for p in points], each, marker="o", label=name)
    axis.set_xlabel("number")
    axis.set_ylabel("microseconds each")
    axis.legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure the curves that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("curves", nargs="*", metavar="CURVE", help=f"of {', '.join(CURVES)}")
    parser.add_argument("--quick", action="store_true", help="all points but the largest one")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="needs matplotlib")
    args = parser.parse_args()
    found: dict[str, list[Point]] = {}
    with quiet("datadist"):
        for name in args.curves or CURVES:
            measure, counts = CURVES[name]
            for curve, point in measure(counts[:-1] if args.quick else counts):
                found.setdefault(curve, []).append(point)
    _print(found)
    if args.plot:
        _plot(found, args.plot)


if __name__ == "__main__":
    main()

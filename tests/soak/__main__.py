"""Link, pull, push, unlink, kill and restart up to 8 processes at random; verify every byte.

`python -m tests.soak --minutes 5 --seed 7`. The same seed makes the same steps. Exits with 1 when a
byte was wrong, something leaked, anything ended in a way that is not documented, or no bytes of some
kind of transfer were compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import secrets
import sys
import tempfile
import time
from pathlib import Path

from datadist.cli.tables import paragraph
from tests.soak.comparing import table, uncompared
from tests.soak.plot import plot
from tests.soak.resources import ENOUGH
from tests.soak.world import World

WIDTH = 79


def main(arguments: list[str] | None = None) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=0, help="end after so many steps")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 31))
    parser.add_argument("--plot", type=Path, default=Path("build/soak.png"), metavar="PNG")
    args = parser.parse_args(arguments)
    print(f"seed {args.seed}", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="datadist-") as place:
        world = World(args.seed, Path(place))
        try:
            while time.monotonic() - started < args.minutes * 60 and not world.over:
                world.step()
                if world.totals.steps.total() == args.steps:
                    break
            world.end()
        finally:
            world.close()
    _report(world, time.monotonic() - started)
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: needs matplotlib (the extra soak)")
    else:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(world.totals, args.plot)
        print(f"plot: {args.plot}")
    return int(world.totals.failed)


def _report(world: World, seconds: float) -> None:
    totals = world.totals
    steps = ", ".join(f"{name} {count}" for name, count in totals.steps.most_common())
    faults = ", ".join(f"{name} {count}" for name, count in totals.faults.most_common())
    counts = f"{seconds:.0f} s, {totals.steps.total()} steps (digest {world.digest}): {steps}"
    print(paragraph(counts, WIDTH, "  "))
    print(paragraph(f"{totals.faults.total()} faults: {faults or 'none'}", WIDTH, "  "))
    moved = sum(found.moved for found in totals.compared.values())
    transfers = sum(found.transfers for found in totals.compared.values())
    print(f"{transfers} transfers verified, {moved} bytes moved, {totals.wrong} lost or wrong:")
    for line in table(totals.compared):
        print(f"  {line}")
    for line in uncompared(totals.steps, totals.compared):
        print(paragraph(f"not compared: {line}", WIDTH, "  "))
    for what in sorted({what for _, what, _ in totals.latencies}):
        values = sorted(value for _, name, value in totals.latencies if name == what)
        middle, worst = values[len(values) // 2] * 1e3, values[-1] * 1e3
        print(f"{what:12} {len(values):6} times, median {middle:9.3f} ms, worst {worst:9.3f} ms")
    judged = [rests for rests in totals.rests.values() if len(rests) >= ENOUGH]
    most = max(map(len, totals.rests.values()), default=0)
    few = len(totals.rests) - len(judged)
    print(
        f"use compared at rest: {len(judged)} of {len(totals.rests)} processes, up to {most} times"
    )
    if few:
        print(f"not compared: the use of {few} processes, which had fewer than {ENOUGH} rests")
    print(f"{len(totals.leaks)} leaks, {len(totals.problems)} problems")
    for line in (*totals.leaks, *totals.problems):
        print(f"  {line[:600]}")
    verdict = f"FAILED, again with --seed {world.seed}" if totals.failed else "passed"
    print(f"soak of seed {world.seed}: {verdict}")


if __name__ == "__main__":
    sys.exit(main())

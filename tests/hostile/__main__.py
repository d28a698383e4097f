"""A hostile member beside three honest ones, one behaviour after another, then all at once.

`python -m tests.hostile --wire shm --rounds 8`. Rounds beside the hostile member alternate with rounds
beside a process that only computes. Prints the median and the worst time of each operation of the honest
members, the median beside the one that computes, and what the honest ones logged. Exits with 1 when an
operation failed, or when a median grew by more than ``--ratio``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from tests import ports
from tests.hostile.behaviours import BEHAVIOURS
from tests.hostile.world import Seen, World

RATIO = 2.0
WIRES = ("shm", "tcp")
OPERATIONS = ("link", "pull, known key", "pull, new key", "unlink", "finalize")
SHOWN = 3
"""Reasons, and failures, that are printed."""


def observe(wire: str, names: list[str], rounds: int, until: str = "") -> tuple[Seen, Seen]:
    """What the honest members saw beside a process that computes, and beside these behaviours."""
    with tempfile.TemporaryDirectory(prefix="datadist-") as place, ExitStack() as stack:
        world = World(Path(place), wire, ports.free(4))
        stack.callback(world.close)
        return world.run(names, rounds, until)


def main(arguments: list[str] | None = None) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--wire", choices=WIRES, action="append")
    parser.add_argument("--rounds", type=int, default=8, help="of each kind, from init to finalize")
    parser.add_argument("--behaviour", choices=BEHAVIOURS, action="append")
    parser.add_argument("--ratio", type=float, default=RATIO)
    args = parser.parse_args(arguments)
    bad: list[str] = []
    for wire in args.wire or WIRES:
        chosen = args.behaviour or list(BEHAVIOURS)
        runs = [[name] for name in chosen] + ([chosen] if len(chosen) > 1 else [])
        for names in runs:
            title = names[0] if len(names) == 1 else "all at once"
            quiet, seen = observe(wire, names, args.rounds)
            _print(wire, title, seen, quiet)
            bad += [f"{wire}, {title}: {what}" for what in faults(seen, quiet, args.ratio)]
    print(f"{len(bad)} faults")
    for line in bad:
        print(f"  {line[:300]}")
    return int(bool(bad))


def faults(seen: Seen, quiet: Seen, ratio: float) -> list[str]:
    """What a hostile member must not be able to do, and did."""
    found = [f"{len(seen.failures)} failures: {seen.failures[0]}"] if seen.failures else []
    for what in OPERATIONS:
        before, now = quiet.times[what], seen.times[what]
        if before and now and median(now) > ratio * median(before):
            found.append(f"{what} takes {median(now) / median(before):.1f} times as long")
    return found


def _print(wire: str, title: str, seen: Seen, quiet: Seen) -> None:
    print(f"\n{wire}: {title} (was a member {seen.joined} times, {seen.steps} steps)")
    for what in OPERATIONS:
        usual, times = quiet.times[what], seen.times[what]
        if usual and times:
            print(
                f"  {what:16} median {median(times) * 1e3:9.3f} ms, worst {max(times) * 1e3:9.3f} ms, "
                f"usual {median(usual) * 1e3:9.3f} ms, {median(times) / median(usual):6.2f} times"
            )
    for reason, count in seen.reasons.most_common(SHOWN):
        print(f"  ended {count} times: {reason}")
    for failure in seen.failures[:SHOWN]:
        print(f"  FAILED {failure[:300]}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

"""Interrupt the calls of an engine at random moments, beside a peer over shared memory.

`python -m tests.interrupted --rounds 10000 --nested 2000 --seed 7`. Exits with 1 where an exception
did not come out as it was raised, a call hung, the engine did not work afterwards, or something was left.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import tempfile
import time
from typing import Any

from tests import nodes, ports
from tests.interrupted import victim

SECONDS = 3600.0


def play(seed: int, rounds: int, nested: int, skip: str = "") -> dict[str, Any]:
    """What came of one run, in two processes."""
    with tempfile.TemporaryDirectory(prefix="datadist-") as place:
        environ = {"DATADIST_RUNTIME_DIR": place}
        pair = [nodes.Node(environ, ["tests.interrupted.victim"]) for _ in range(2)]
        try:
            port = ports.free(1)[0]
            pair[0].do(victim.serve, port)
            found: dict[str, Any] = pair[1].do(
                victim.play, port, seed, rounds, nested, skip, timeout=SECONDS
            )
            pair[0].do(nodes.finalize)
        finally:
            for node in pair:
                node.close()
        left = os.listdir(place)
    return {**found, "faults": found["faults"] + [f"left in the directory: {n}" for n in left]}


def main(arguments: list[str] | None = None) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.interrupted", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10_000, help="exceptions of handlers")
    parser.add_argument("--nested", type=int, default=2_000, help="calls of handlers")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 31))
    parser.add_argument("--skip", default="", help="leave out calls with this in their names")
    args = parser.parse_args(arguments)
    print(f"seed {args.seed}", flush=True)
    started = time.monotonic()
    found = play(args.seed, args.rounds, args.nested, args.skip)
    for title in ("raised", "nested"):
        counts = ", ".join(f"{name} {count}" for name, count in found[title].most_common())
        print(f"{title} {found[title].total()}: {counts}")
    for fault in found["faults"]:
        print(f"FAULT {fault}")
    print(f"{time.monotonic() - started:.0f} s, {len(found['faults'])} faults")
    return int(bool(found["faults"]))


if __name__ == "__main__":
    sys.exit(main())

"""Fuzz every target, guided by coverage, for some seconds each: `python -m tests.fuzz`.

Needs the extra ``fuzz`` (atheris). Each target runs in a process of its own. What fails is written to
``build/fuzz`` and exits with 1; `python -m tests.fuzz --again FILE --target NAME` runs it again.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

OUT = Path("build/fuzz")
FINAL = re.compile(rb"number_of_executed_units: (\d+)")
COVERAGE = re.compile(rb"cov: (\d+) ft: \d+ corp: (\d+)")


def main() -> int:
    """Exit status: 0 when no input did harm."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=8, help="per target (default 8)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the fuzzer; 0 takes another each time"
    )
    parser.add_argument("--target", action="append", help="only this one; may be repeated")
    parser.add_argument("--again", type=Path, metavar="FILE", help="run one input once")
    args = parser.parse_args()
    from tests.fuzz.targets import NAMES, opened

    names = args.target or NAMES
    if args.again:
        for name in names:
            with opened(name) as target:
                print(name, "accepts it" if target(args.again.read_bytes()) else "refuses it")
        return 0
    OUT.mkdir(parents=True, exist_ok=True)
    results = [_run(name, args.seconds, args.seed) for name in names]
    total = sum(count for count, _ in results)
    crashes = sum(bad for _, bad in results)
    print(f"{total} inputs in {len(names)} targets, {crashes} crashes")
    return 1 if crashes else 0


def _run(name: str, seconds: int, seed: int) -> tuple[int, int]:
    """Inputs tried, and whether one did harm."""
    from tests.fuzz.seeds import REFUSED, SEEDS
    from tests.fuzz.targets import LIVE

    with tempfile.TemporaryDirectory() as place:
        corpus = Path(place, "corpus")
        corpus.mkdir()
        for number, data in enumerate([*SEEDS[name], *REFUSED.get(name, [])]):
            (corpus / str(number)).write_bytes(data)
        command = [
            sys.executable, "-m", "tests.fuzz.one", name, str(corpus),
            f"-max_total_time={seconds}", f"-timeout={60 if name in LIVE else 20}",
            "-rss_limit_mb=2048", "-max_len=4096",
            f"-artifact_prefix={OUT}/{name}-", "-print_final_stats=1", f"-seed={seed}",
        ]  # fmt: skip
        # The fuzzer ends its process at once: what the target leaves goes with the place.
        environ = {**os.environ, "TMPDIR": place}
        try:
            done = subprocess.run(
                command, capture_output=True, check=False, timeout=seconds + 120, env=environ
            )
        except subprocess.TimeoutExpired as error:
            print(f"{name:12} did not end, FAILED", flush=True)
            sys.stderr.buffer.write((error.stderr or b"")[-4000:])
            return 0, 1
    executed = FINAL.search(done.stderr)
    covered = COVERAGE.findall(done.stderr)
    count = int(executed[1]) if executed else 0
    bad = done.returncode != 0 or count == 0
    about = f"{int(covered[-1][0])} edges, {int(covered[-1][1])} kept" if covered else "no coverage"
    verdict = f", FAILED with {done.returncode}" if bad else ""
    print(f"{name:12} {count:8} inputs, {about}{verdict}", flush=True)
    if bad:
        sys.stdout.flush()
        raised = done.stdout.find(b"=== Uncaught Python exception")
        if raised >= 0:
            sys.stderr.buffer.write(done.stdout[raised:][:4000])
        sys.stderr.buffer.write(done.stderr[-4000:])
    return count, int(bad)


if __name__ == "__main__":
    sys.exit(main())

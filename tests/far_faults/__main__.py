"""Faults in the middle of transfers between engines on two hosts, many times, on a transport by name.

`python -m tests.far_faults --backend ucx --rounds 50`. The hosts are network namespaces: it needs root.
Each round stops or kills a process, or takes a cable down, while a cache of 64 MiB moves over a slow
cable. Then it verifies at every living end: a documented error in time, that the engine works, that no
late byte comes into memory that is used again, that all of it can be used again, and that nothing is
left open after finalize.

The error's time is from the fault on, or from the moment when a stopped end goes on; of a time-out it is
that of the whole call, whose limit is 1.5 s. The quarantine's is from the error until all memory is in
use again. A fault that lasts is ended 2 s after FORCE_SECONDS, in two of four rounds as soon as the call
has its error. FORCE_SECONDS is 1 s in most rounds, by a hook of the harness, and the real one in the
first --real rounds of each case. The table tells both apart. Exits with 1 when a round was wrong, and
keeps what is known of it in --evidence.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

from datadist.transport import FORCE_SECONDS
from tests.far_faults import place, settings
from tests.far_faults.cases import BY_NAME, CASES, Case
from tests.far_faults.report import table
from tests.far_faults.rounds import Outcome, run
from tests.far_faults.settings import MEMORIES, SHORT_FORCE_SECONDS, Setting


def main(arguments: list[str] | None = None) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.far_faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backend", required=True, help="name of the transport")
    parser.add_argument("--rounds", type=int, default=50, help="of each case")
    parser.add_argument("--case", action="append", choices=BY_NAME, help="all, if not given")
    parser.add_argument("--real", type=int, default=1, help="rounds with the real FORCE_SECONDS")
    parser.add_argument("--environ", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--evidence", type=Path, default=Path("build/far_faults"))
    args = parser.parse_args(arguments)
    missing = settings.missing(args.backend) or place.missing()
    if missing is not None:
        parser.error(missing)
    environ = dict(each.split("=", 1) for each in args.environ)
    outcomes: list[Outcome] = []
    for case in [BY_NAME[name] for name in args.case] if args.case else CASES:
        for number in range(args.rounds):
            force = FORCE_SECONDS if number < args.real else SHORT_FORCE_SECONDS
            memory = MEMORIES[number % len(MEMORIES)]
            quick = force != FORCE_SECONDS and number % 4 >= 2
            setting = Setting(args.backend, memory, force, quick, environ)
            outcomes.append(_round(case, setting, args.evidence / f"{case.name}-{number}"))
    print("\n".join(table(outcomes)))
    wrong = sum(bool(outcome.findings) for outcome in outcomes)
    print(f"{wrong} of {len(outcomes)} rounds were wrong" + (f": {args.evidence}" if wrong else ""))
    return int(wrong > 0)


def _round(case: Case, setting: Setting, evidence: Path) -> Outcome:
    """One round; files are kept only of one that was wrong."""
    shutil.rmtree(evidence, ignore_errors=True)
    began = time.monotonic()
    outcome = run(case, setting, evidence)
    if not outcome.findings:
        shutil.rmtree(evidence)
    verdict = "wrong" if outcome.findings else "right"
    print(
        f"{case.name}, {setting.memory}{', quick' if setting.quick else ''}, FORCE_SECONDS "
        f"{setting.force_seconds:g}: {verdict}, error "
        f"{outcome.error_seconds:.2f} s, quarantine {outcome.quarantine_seconds:.2f} s, round "
        f"{time.monotonic() - began:.1f} s",
        flush=True,
    )
    for finding in outcome.findings:
        print(f"  {finding}", flush=True)
    return outcome


if __name__ == "__main__":
    sys.exit(main())

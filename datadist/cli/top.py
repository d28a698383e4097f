"""Watch the engines of this user on this host: links, throughput, latencies, pools, grants, failures.

Engines answer over their sockets, to the same user only. IN is what an engine pulled, and what peers
of this host pushed to it; OUT the other way round. MEAN is the time of the engine's own
transfers between two looks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence

from datadist.base.digits import number_argument
from datadist.cli.tables import render
from datadist.control.own_directory import RuntimeDirError
from datadist.diagnosis.activity import Activity, Look, Rates, activities
from datadist.diagnosis.asking import ask_engines

ANSWER_SECONDS = 1.0
RATES = ("IN", "OUT", "OPS/s", "MEAN")
CLEAR, HOME = "\x1b[J", "\x1b[H"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    parser.add_argument("--once", action="store_true",
                        help="look twice, an interval apart, print that and end")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print an object of JSON per look")
    parser.add_argument("--interval", metavar="SECONDS", type=_seconds, default=1.0,
                        help="seconds between looks (default 1)")  # fmt: skip
    parser.add_argument("--count", metavar="LOOKS", type=number_argument(1),
                        help="end after so many looks")  # fmt: skip
    parser.add_argument(
        "--job", metavar="NAME", help="engines of this job only; '' is the one without a name"
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 3600")
    return value


def run(args: argparse.Namespace) -> int:
    """Returns 0; 1 where the runtime directory cannot be used."""
    try:
        _watch(args)
    except RuntimeDirError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _watch(args: argparse.Namespace) -> None:
    before = Look(ask_engines(args.job, ANSWER_SECONDS))
    live = sys.stdout.isatty() and not (args.once or args.json)
    left = 1 if args.once else args.count
    while left is None or left > 0:
        time.sleep(args.interval)
        now = Look(ask_engines(args.job, ANSWER_SECONDS))
        found = activities(before, now)
        if args.json:
            print(json.dumps(_as_json(found)), flush=True)
        elif live:
            _redraw(screen(found))
        else:
            print("\n".join(screen(found)), flush=True)
        before = now
        left = None if left is None else left - 1


def _redraw(lines: Sequence[str]) -> None:
    size = _size_of_window()
    shown = [line[: size.columns] for line in lines[: size.lines - 1]]
    if len(lines) > len(shown):
        rest = f"... {len(lines) - len(shown) + 1} more lines: enlarge the window, or use --once"
        shown[-1] = rest[: size.columns]
    print(HOME + "\n".join(f"{line}\x1b[K" for line in shown) + "\n" + CLEAR, end="", flush=True)


def _size_of_window() -> os.terminal_size:
    """As it is now, where the terminal says so: COLUMNS and LINES are of when a shell began."""
    with contextlib.suppress(OSError):
        size = os.get_terminal_size(sys.stdout.fileno())
        if size.columns and size.lines:
            return size
    return shutil.get_terminal_size()


def screen(found: Sequence[Activity]) -> list[str]:
    """The lines of one look, 80 columns wide where names are short."""
    links = [link for each in found for link in each.links]
    ok = sum(link.state == "OK" for link in links)
    lines = [
        f"datadist top, {time.strftime('%H:%M:%S')}: {len(found)} engines, {len(links)} links, {ok} OK",
        "IN, OUT: GB/s; MEAN: us of a transfer that it began; POOL: used, size (binary)",
        "",
    ]
    if not found:
        lines.append("no engine of this user runs on this host (see DATADIST_RUNTIME_DIR, --job)")
        return lines
    lines += _engines(found)
    if links:
        lines += ["", *_links(found)]
    failures = [text for each in found for text in each.failures]
    return lines + (["", *failures] if failures else [])


def _engines(found: Sequence[Activity]) -> list[str]:
    header = ["CLUSTER", "PID", "PROGRAM", "BACKEND", *RATES, "POOL", "GRANTS"]
    rows = [
        [each.cluster_id, each.pid or "-", each.program[:12], each.backend,
         *_rates(each.rates), each.pool, each.grants]
        for each in found
    ]  # fmt: skip
    return render(header, rows).splitlines()


def _links(found: Sequence[Activity]) -> list[str]:
    header = ["LINK", "FROM", "TO", "BY", "STATE", *RATES, "FAILED"]
    rows = [
        [link.name[:20], each.cluster_id, link.cluster_id, link.backend, link.state,
         *_rates(link.rates), link.errors]
        for each in found for link in each.links
    ]  # fmt: skip
    return render(header, rows).splitlines()


def _rates(rates: Rates) -> list[str]:
    mean = "-" if rates.mean is None else f"{rates.mean * 1e6:.0f}"
    return [
        f"{rates.bytes_in / 1e9:.2f}",
        f"{rates.bytes_out / 1e9:.2f}",
        f"{rates.operations:.0f}",
        mean,
    ]


def _as_json(found: Sequence[Activity]) -> dict[str, object]:
    return {"time": time.time(), "engines": [each.as_dict() for each in found]}

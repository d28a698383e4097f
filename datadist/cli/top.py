"""Watch the engines of this user on this host: links, throughput, latencies, pools, grants, failures.

Engines answer over their sockets, to the same user only. IN is what an engine pulled, and what peers
of this host pushed to it; OUT the other way round. MEAN is the time of the engine's own
transfers between two looks. Links that are not OK come first, then the busiest.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

from datadist.base.digits import number_argument
from datadist.cli.style import BAD, GOOD, SOFT, TITLE, WARN, Styled, cut, paint
from datadist.cli.tables import render, size_of_terminal
from datadist.control.own_directory import RuntimeDirError
from datadist.diagnosis.activity import Activity, LinkActivity, Look, Rates, activities
from datadist.diagnosis.asking import ask_engines

ANSWER_SECONDS = 1.0
RATES = ("IN", "OUT", "OPS/s", "MEAN")
STATES = {"OK": GOOD, "PREPARING": WARN}
"""All others are failures."""
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
    size = size_of_terminal()
    shown = [cut(line, size.columns) for line in lines[: size.lines - 1]]
    if len(lines) > len(shown):
        rest = f"... {len(lines) - len(shown) + 1} more lines: enlarge the window, or use --once"
        shown[-1] = rest[: size.columns]
    print(HOME + "\n".join(f"{line}\x1b[K" for line in shown) + "\n" + CLEAR, end="", flush=True)


def screen(found: Sequence[Activity]) -> list[str]:
    """The lines of one look, 80 columns wide where names are short; the most important ones first."""
    links = [link for each in found for link in each.links]
    ok = sum(link.state == "OK" for link in links)
    silent = sum(each.report is None for each in found)
    counts = f"{len(found)} engines, {len(links)} links, {ok} OK"
    lines = [
        paint(f"datadist top, {time.strftime('%H:%M:%S')}: {counts}", TITLE)
        + paint(f", {silent} silent" * bool(silent), BAD),
        paint(
            "IN, OUT: GB/s; MEAN: us of a transfer that it began; POOL: used, size (binary)", SOFT
        ),
        "",
    ]
    if not found:
        lines.append("no engine of this user runs on this host (see DATADIST_RUNTIME_DIR, --job)")
        return lines
    lines += _engines(found)
    failures = [text for each in found for text in each.failures]
    if failures:
        lines += ["", *(paint(text, BAD) for text in failures)]
    if links:
        lines += ["", *_links(found)]
    return lines


def _engines(found: Sequence[Activity]) -> list[str]:
    header = ["CLUSTER", "PID", "PROGRAM", "BACKEND", *RATES, "POOL", "GRANTS"]
    rows = [
        [each.cluster_id, each.pid or "-", each.program[:12],
         each.backend if each.report is not None else Styled("silent", BAD),
         *_rates(each.rates), each.pool, each.grants]
        for each in found
    ]  # fmt: skip
    return render(header, rows).splitlines()


def _links(found: Sequence[Activity]) -> list[str]:
    header = ["LINK", "FROM", "TO", "BY", "STATE", *RATES, "FAILED"]
    pairs = sorted(((each, link) for each in found for link in each.links), key=_urgency)
    rows = [
        [link.name[:20], each.cluster_id, link.cluster_id, link.backend, _state(link.state),
         *_rates(link.rates), Styled(str(link.errors), BAD) if link.errors else "0"]
        for each, link in pairs
    ]  # fmt: skip
    return render(header, rows).splitlines()


def _urgency(pair: tuple[Activity, LinkActivity]) -> tuple[bool, float]:
    """Sorts links that are not OK before the others, and then by what they move."""
    _, link = pair
    return link.state == "OK", -(link.rates.bytes_in + link.rates.bytes_out)


def _state(state: str) -> str:
    return Styled(state, STATES.get(state, BAD))


def _rates(rates: Rates) -> list[str]:
    mean = "-" if rates.mean is None else f"{rates.mean * 1e6:.0f}"
    operations = f"{rates.operations:.0f}" if rates.operations else "-"
    return [_rate(rates.bytes_in), _rate(rates.bytes_out), operations, mean]


def _rate(value: float) -> str:
    """GB/s; nothing at all looks different from little."""
    if not value:
        return "-"
    return f"{value / 1e9:.2f}" if value >= 5e6 else "<.01"


def _as_json(found: Sequence[Activity]) -> dict[str, object]:
    return {"time": time.time(), "engines": [each.as_dict() for each in found]}

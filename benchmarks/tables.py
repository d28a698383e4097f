"""The results of `compare.py` as tables of a page, between two markers."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datadist.base import cgroups
from datadist.base.processor import processor

BEGIN, END = "<!-- tables of compare.py: begin -->", "<!-- tables of compare.py: end -->"
LARGE = ("contiguous", "paged-gqa", "paged-mla")
SMALL = (("latency", "One block of 4 KiB, pulled"), ("push", "One block of 4 KiB, pushed"))
OURS, OTHERS = "datadist", "nixl"

Results = Sequence[Mapping[str, Any]]


def described(rounds: int, pulls: int) -> str:
    """Where and how it was measured."""
    return (
        f"{cgroups.cpus()} processors ({processor()}), Linux {platform.release().partition('-')[0]}, "
        f"Python {platform.python_version()}; {rounds} rounds of {pulls} pulls, medians:"
    )


def markdown(results: Results, what: str) -> str:
    """A table of each kind for which there are results."""
    small = [_small(results, *each) for each in SMALL]
    parts = [what, _large(results), *small, _connecting(results)]
    return "\n\n".join(part for part in parts if part)


def replaced(page: str, tables: str) -> str:
    """A page with other tables between its markers. Raises ``ValueError`` where these are missing."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page must have one line {BEGIN!r}, and one {END!r} behind it")
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def _large(results: Results) -> str:
    """GB/s, and ours as multiples of each of the engines that we are compared with."""
    speeds = {
        (r["contender"], r["workload"]): r["bytes"] / statistics.median(r["warm"]) / 1e9
        for r in results
        if r["workload"] in LARGE and r["warm"] and "failed" not in r
    }
    workloads = [name for name in LARGE if any(name == workload for _, workload in speeds)]
    names = list(dict.fromkeys(name for name, _ in speeds))
    if not names:
        return ""
    rows = [[name, *(_number(speeds.get((name, w))) for w in workloads)] for name in names]
    for ours in (name for name in names if name.startswith(OURS)):
        for theirs in (name for name in names if name.startswith(OTHERS)):
            ratios = [
                _number(speeds[ours, w] / speeds[theirs, w])
                if (ours, w) in speeds and (theirs, w) in speeds
                else "-"
                for w in workloads
            ]
            rows.append([f"**{ours} / {theirs}**", *ratios])
    return _table(["GB/s", *workloads], rows)


def _small(results: Results, workload: str, title: str) -> str:
    rows = [
        [r["contender"], f"{statistics.median(r['warm']) * 1e6:.1f} us", f"{min(r['warm']) * 1e6:.1f} us"]
        for r in results
        if r["workload"] == workload and r["warm"] and "failed" not in r
    ]  # fmt: skip
    return _table([title, "median", "fastest"], rows) if rows else ""


def _connecting(results: Results) -> str:
    rows = [
        [r["contender"], f"{statistics.median(r['connect']) * 1e3:.1f} ms"]
        for r in results
        if r["workload"] == "link" and r["connect"] and "failed" not in r
    ]
    return _table(["Connect to first byte, 64 MiB at each end", "median"], rows) if rows else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

"""Tables of results for people."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from datadist.bench.results import (
    BesideLarge,
    Grants,
    Latency,
    LinkTime,
    Parallel,
    Result,
    ScalePoint,
    Series,
    ThreadSpeed,
    Throughput,
    percentiles,
)
from datadist.bench.shapes import MIB
from datadist.cli.style import BAD, GOOD, Styled
from datadist.cli.tables import paragraph, render

NOTE_WIDTH = 79
MARKS = ("p10", "p50", "p90", "p99", "max")
SPEED_NOTE = (
    "GB/S: median; RANGE: slowest to fastest; COLD: the first transfer after the link was OK, "
    "/ NEXT: its time as part of the next one's"
)
LIMIT_NOTE = (
    "GB/s of copies of as many bytes, in brackets transfers as part of that (median of pairs); "
    "*: the fastest one that can move this memory, / LIMIT above"
)
COST_NOTE = "PREPARE: time outside the transport; CPU: processor seconds per GiB"


def report(results: Sequence[Result], width: int | None = None) -> str:
    """One table per kind of result, of 80 columns at most where figures are not out of the ordinary."""
    parts = [
        _throughputs([r for r in results if isinstance(r, Throughput)], width),
        _latencies([r for r in results if isinstance(r, Latency)], width),
        _links([r for r in results if isinstance(r, LinkTime)], width),
        _scales([r for r in results if isinstance(r, ScalePoint)], width),
        _besides([r for r in results if isinstance(r, ThreadSpeed)], width),
        *(_parallel(r, width) for r in results if isinstance(r, Parallel)),
        *(_grants(r, width) for r in results if isinstance(r, Grants)),
        *(_beside_large(r, width) for r in results if isinstance(r, BesideLarge)),
    ]
    return "\n\n".join(part for part in parts if part)


def problems(results: Sequence[Result]) -> list[str]:
    """Bytes that were not what they must be."""
    checked = [r for r in results if isinstance(r, (Throughput, Latency, Parallel, Grants))]
    return [f"{result.workload}: {problem}" for result in checked for problem in result.problems]


def _throughputs(results: list[Throughput], width: int | None) -> str:
    if not results:
        return ""
    speed = render(
        ("WORKLOAD", "MIB", "SEGMENTS", "GB/S", "RANGE", "/ LIMIT", "COLD", "/ NEXT"),
        [_speed_row(result) for result in results], width,
    )  # fmt: skip
    cost = render(
        ("WORKLOAD", "PREPARE", "CPU HERE", "CPU PEER", "VERIFIED"),
        [_cost_row(result) for result in results], width,
    )  # fmt: skip
    parts = (speed, SPEED_NOTE), (_limits(results, width), LIMIT_NOTE), (cost, COST_NOTE)
    return "\n\n".join(f"{table}\n{_note(text, width)}" for table, text in parts)


def _note(text: str, width: int | None) -> str:
    return paragraph(text, width or NOTE_WIDTH)


def _speed_row(result: Throughput) -> list[object]:
    return [
        result.workload,
        f"{result.nbytes / MIB:.0f}",
        result.segments,
        f"{result.rate(result.warm.median):.2f}",
        f"{result.rate(result.warm.worst):.2f}-{result.rate(result.warm.best):.2f}",
        f"{result.ratios()[result.limit]:.2f}",
        f"{result.rate(result.cold.median):.2f}",
        f"{result.cold_over_second():.2f}",
    ]


def _cost_row(result: Throughput) -> list[object]:
    return [
        result.workload,
        _time(result.prepare.median),
        f"{result.cpu_own:.3f}",
        f"{result.cpu_peer:.3f}",
        Styled("NO", BAD) if result.problems else Styled("yes", GOOD),
    ]


def _limits(results: list[Throughput], width: int | None) -> str:
    """A row for each limit, a column for each workload."""
    names = dict.fromkeys(name for result in results for name in result.limits)
    rows = [[name, *(_limit(result, name) for result in results)] for name in names]
    return render(("LIMIT", *(result.workload.upper() for result in results)), rows, width)


def _limit(result: Throughput, name: str) -> str:
    if name not in result.limits:
        return "-"
    rate = result.rate(result.limits[name].median)
    star = " *" if name == result.limit else ""
    return f"{rate:.2f} ({result.ratios()[name]:.2f}){star}"


def _latencies(results: list[Latency], width: int | None) -> str:
    rows = []
    for result in results:
        parts = (
            ("whole call", result.seconds),
            ("in the transport", result.transport),
            (result.limit_name, result.copy),
        )
        for what, seconds in parts:
            marks = percentiles(seconds)
            rows.append([what, *(_time(marks[name]) for name in MARKS)])
    header = ("LATENCY OF 4 KIB", *(name.upper() for name in MARKS))
    return render(header, rows, width) if rows else ""


def _links(results: list[LinkTime], width: int | None) -> str:
    rows = []
    for result in results:
        pool = f"{result.pool / MIB:.0f}"
        rows += [
            [pool, "link to OK", *_spread(result.ok)],
            [pool, "link to the first byte", *_spread(result.first_byte)],
            [pool, "second transfer", *_spread(result.later)],
            [pool, "init", _time(result.init), "-"],
        ]
    return render(("POOL MIB", "LINKING", "MEDIAN", "RANGE"), rows, width) if rows else ""


def _scales(results: list[ScalePoint], width: int | None) -> str:
    rows = []
    for point in results:
        rate = f"{point.nbytes / point.seconds.median / 1e9:.2f}" if point.nbytes else "-"
        part = point.limit.median / point.seconds.median if point.limit else None
        rows.append(
            [
                point.curve, point.x, *_spread(point.seconds), rate,
                "-" if part is None else f"{part:.2f}",
                _time(point.prepare.median) if point.prepare else "-",
            ]
        )  # fmt: skip
    if not rows:
        return ""
    limits = " or ".join(sorted({point.limit_name for point in results if point.limit}))
    header = ("CURVE", "X", "MEDIAN", "RANGE", "GB/S", "/ LIMIT", "PREPARE")
    note = _note(f"/ LIMIT: speed as part of that of the {limits}", width) if limits else ""
    return f"{render(header, rows, width)}\n{note}".rstrip()


def _besides(results: list[ThreadSpeed], width: int | None) -> str:
    rows = [
        [f"{max(result.alone) / 1e3:.1f}", f"{max(result.beside) / 1e3:.1f}", f"{result.kept:.0%}"]
        for result in results
    ]
    header = ("PYTHON THREAD, 1000 STEPS/S: ALONE", "BESIDE TRANSFERS", "KEPT")
    return render(header, rows, width) if rows else ""


def _parallel(result: Parallel, width: int | None) -> str:
    size = f"{result.nbytes / MIB:.0f} MiB"
    rows = [
        [f"two of {size}, in turn", _time(result.sequential.median), ""],
        [f"two of {size}, at once", _time(result.together.median), f"{result.part:.2f} of in turn"],
        [f"one of {size}, beside blocks", _time(result.large.median), ""],
        ["a block of 4 KiB, alone", *_median_and_p90(result.alone)],
        [f"a block of 4 KiB, beside {size}", *_median_and_p90(result.beside)],
    ]
    return render(("PARALLEL", "MEDIAN", ""), rows, width)


def _median_and_p90(seconds: Sequence[float]) -> tuple[str, str]:
    if not seconds:
        return "-", "none ended meanwhile"
    marks = percentiles(seconds)
    return _time(marks["p50"]), f"P90 {_time(marks['p90'])}, {len(seconds)} blocks"


def _grants(result: Grants, width: int | None) -> str:
    size = f"{result.nbytes / MIB:.0f} MiB"
    rows = [
        ["grant", _time(result.grant.median)],
        [f"pull {size} of an open cache", _time(result.open.median)],
        [f"pull {size} by token", _time(result.by_token.median)],
        [f"pull {size} by key", _time(result.by_key.median)],
        [f"pull {size} until it is consumed", _time(result.request.median)],
        ["revoke", _time(result.revoke.median)],
        [f"grant, each of {result.live} live", _time(result.grant_each)],
        [f"revoke, each of {result.live} live", _time(result.revoke_each)],
        ["memory of a live grant", f"{result.bytes_each / 1024:.1f} KiB"],
    ]
    return render(("GRANTS", "MEDIAN"), rows, width)


def _beside_large(result: BesideLarge, width: int | None) -> str:
    kinds = {"pull of 4 KiB": result.pulls, "message out": result.out, "message in": result.inward}
    rows = []
    for kind, both in kinds.items():
        marks = [percentiles(each) for each in both]
        rows.append([
            kind, *(_time(each[mark]) for each in marks for mark in ("p50", "p99", "max"))
        ])  # fmt: skip
    header = ("SMALL", "ALONE P50", "P99", "MAX", "BESIDE P50", "P99", "MAX")
    note = (
        f"BESIDE: while {result.nbytes / MIB:.0f} MiB are pulled, in "
        f"{_time(statistics.median(result.large))}; out: from the process that pulls, in: to it; "
        f"alone {result.messages_per_second:.0f} messages/s"
    )
    return f"{render(header, rows, width)}\n{_note(note, width)}"


def _spread(series: Series) -> tuple[str, str]:
    return _time(series.median), f"{_time(series.best)}-{_time(series.worst)}"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"

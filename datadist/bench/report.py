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
from datadist.cli.tables import render


def report(results: Sequence[Result]) -> str:
    """One table per kind of result."""
    parts = [
        _throughputs([r for r in results if isinstance(r, Throughput)]),
        _latencies([r for r in results if isinstance(r, Latency)]),
        _links([r for r in results if isinstance(r, LinkTime)]),
        _scales([r for r in results if isinstance(r, ScalePoint)]),
        _besides([r for r in results if isinstance(r, ThreadSpeed)]),
        _parallels([r for r in results if isinstance(r, Parallel)]),
        _grants([r for r in results if isinstance(r, Grants)]),
        _besides_large([r for r in results if isinstance(r, BesideLarge)]),
    ]
    return "\n\n".join(part for part in parts if part)


def problems(results: Sequence[Result]) -> list[str]:
    """Bytes that were not what they must be."""
    checked = [r for r in results if isinstance(r, (Throughput, Latency, Parallel, Grants))]
    return [f"{result.workload}: {problem}" for result in checked for problem in result.problems]


def _throughputs(results: list[Throughput]) -> str:
    if not results:
        return ""
    header = (
        "WORKLOAD", "MIB", "SEGMENTS", "GB/S", "RANGE", "COLD", "/ NEXT", "LIMIT", "WHICH", "/ LIMIT",
        "PREPARE", "CPU HERE", "CPU PEER", "VERIFIED",
    )  # fmt: skip
    return (
        render(header, [_throughput_row(result) for result in results])
        + "\nGB/s: median, slowest to fastest; COLD: the first transfer after the link was OK, and its "
        "time as part of the next one's;\nLIMIT: the fastest of the limits below that can move this "
        "memory, and GB/s as part of it (median of pairs);\nPREPARE: outside the transport; CPU: "
        "processor seconds per GiB\n\n" + _limits(results)
    )


def _throughput_row(result: Throughput) -> list[object]:
    limit = result.limits[result.limit]
    return [
        result.workload,
        f"{result.nbytes / MIB:.0f}",
        result.segments,
        f"{result.rate(result.warm.median):.2f}",
        f"{result.rate(result.warm.worst):.2f}-{result.rate(result.warm.best):.2f}",
        f"{result.rate(result.cold.median):.2f}",
        f"{result.cold_over_second():.2f}",
        f"{result.rate(limit.median):.2f}",
        result.limit,
        f"{result.ratios()[result.limit]:.2f}",
        _time(result.prepare.median),
        f"{result.cpu_own:.3f}",
        f"{result.cpu_peer:.3f}",
        "NO" if result.problems else "yes",
    ]


def _limits(results: list[Throughput]) -> str:
    """What each limit reached, in GB/s, and GB/s as part of it."""
    names = list(dict.fromkeys(name for result in results for name in result.limits))
    rows = []
    for result in results:
        ratios = result.ratios()
        rows.append([
            result.workload,
            *(
                f"{result.rate(result.limits[name].median):.2f} ({ratios[name]:.2f})"
                if name in ratios else "-"
                for name in names
            ),
        ])  # fmt: skip
    header = ("GB/S OF LIMITS (/ IT)", *(name.upper() for name in names))
    return render(header, rows)


def _latencies(results: list[Latency]) -> str:
    rows = []
    for result in results:
        parts = (
            ("whole call", result.seconds),
            ("in the transport", result.transport),
            (result.limit_name, result.copy),
        )
        for what, seconds in parts:
            marks = percentiles(seconds)
            rows.append([result.workload, what, *(_time(value) for value in marks.values())])
    return render(("WORKLOAD", "", "P1", "P10", "P50", "P90", "P99", "MAX"), rows) if rows else ""


def _links(results: list[LinkTime]) -> str:
    rows = [
        [
            result.workload, f"{result.pool / MIB:.0f}", *_spread(result.ok),
            *_spread(result.first_byte), *_spread(result.later), _time(result.init),
        ]
        for result in results
    ]  # fmt: skip
    header = (
        "WORKLOAD", "POOL MIB", "LINK TO OK", "", "TO FIRST BYTE", "", "SECOND TRANSFER", "", "INIT",
    )  # fmt: skip
    return render(header, rows) if rows else ""


def _scales(results: list[ScalePoint]) -> str:
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
    limits = " or ".join(sorted({point.limit_name for point in results})).upper()
    header = ("CURVE", "X", "MEDIAN", "RANGE", "GB/S", f"/ {limits}", "PREPARE")
    return render(header, rows) if rows else ""


def _besides(results: list[ThreadSpeed]) -> str:
    rows = [
        [
            result.workload,
            f"{max(result.alone) / 1e3:.1f}",
            f"{max(result.beside) / 1e3:.1f}",
            f"{result.kept:.0%}",
        ]
        for result in results
    ]
    header = ("WORKLOAD", "KSTEPS/S ALONE", "BESIDE TRANSFERS", "KEPT")
    return render(header, rows) if rows else ""


def _parallels(results: list[Parallel]) -> str:
    rows = []
    for result in results:
        rows.append([
            result.workload, f"{result.nbytes / MIB:.0f}", _time(result.sequential.median),
            _time(result.together.median), f"{result.part:.2f}", _time(result.large.median),
            _marks(result.alone), _marks(result.beside), len(result.beside),
        ])  # fmt: skip
    header = (
        "WORKLOAD", "MIB", "TWO IN TURN", "AT ONCE", "PART", "LARGE BESIDE SMALL",
        "BLOCK ALONE P50, P90", "BESIDE A LARGE ONE", "BLOCKS",
    )  # fmt: skip
    return render(header, rows) if rows else ""


def _grants(results: list[Grants]) -> str:
    rows = [
        [
            result.workload, f"{result.nbytes / MIB:.0f}", _time(result.grant.median),
            _time(result.open.median), _time(result.by_token.median), _time(result.by_key.median),
            _time(result.request.median), _time(result.revoke.median), result.live,
            _time(result.grant_each), _time(result.revoke_each), f"{result.bytes_each / 1024:.1f}",
        ]
        for result in results
    ]  # fmt: skip
    header = (
        "WORKLOAD", "MIB", "GRANT", "OPEN PULL", "PULL BY TOKEN", "BY KEY", "UNTIL CONSUMED", "REVOKE",
        "LIVE", "GRANT EACH", "REVOKE EACH", "KIB EACH",
    )  # fmt: skip
    return render(header, rows) if rows else ""


def _besides_large(results: list[BesideLarge]) -> str:
    rows = []
    for result in results:
        kinds = {
            "pull of 4 KiB": result.pulls,
            "message from the pulling process": result.out,
            "message to the pulling process": result.inward,
        }
        for kind, (alone, beside) in kinds.items():
            marks = [percentiles(each) for each in (alone, beside)]
            rows.append([
                result.workload, kind,
                *(_time(each[mark]) for each in marks for mark in ("p50", "p99", "max")),
                f"{result.nbytes / MIB:.0f}", _time(statistics.median(result.large)),
                f"{result.messages_per_second:.0f}",
            ])  # fmt: skip
    header = (
        "WORKLOAD", "WHAT", "ALONE P50", "P99", "MAX", "BESIDE P50", "P99", "MAX", "LARGE, MIB",
        "TOOK", "MESSAGES/S ALONE",
    )  # fmt: skip
    return render(header, rows) if rows else ""


def _marks(seconds: Sequence[float]) -> str:
    if not seconds:
        return "none ended"
    marks = percentiles(seconds)
    return f"{_time(marks['p50'])}, {_time(marks['p90'])}"


def _spread(series: Series) -> tuple[str, str]:
    return _time(series.median), f"{_time(series.best)}-{_time(series.worst)}"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"

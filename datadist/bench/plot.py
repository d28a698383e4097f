"""Plots of results: one file, with a panel for each kind of result."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datadist.bench.measured_engine import BenchError
from datadist.bench.results import Latency, Result, ScalePoint, Throughput, percentiles
from datadist.bench.shapes import SHAPES

INK, SOFT, OURS, REFERENCES = "#22252a", "#6b7280", "#1f6feb", ("#9aa3af", "#c4c9d1", "#dfe3e8")
DRAWN = (*SHAPES, "latency", "scale")
"""Workloads that a plot shows."""
ACROSS = 2
"""Panels side by side."""
STYLE: dict[str, Any] = {
    "font.size": 10, "axes.edgecolor": SOFT, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "axes.titlelocation": "left", "axes.titleweight": "bold",
}  # fmt: skip


def check_plot(path: Path, workloads: Sequence[str]) -> None:
    """Raise :class:`BenchError` where :func:`plot` could not draw these, before they are measured."""
    suffix = path.suffix.removeprefix(".").lower()
    formats = _formats()
    if suffix not in formats:
        raise BenchError(
            f"--plot is {path}: expected a name that ends in .{', .'.join(sorted(formats))}"
        )
    if not set(workloads) & set(DRAWN):
        raise BenchError(
            f"--plot draws nothing of {', '.join(workloads)}: add one of {', '.join(DRAWN)}"
        )


def _formats() -> Sequence[str]:
    """Endings of the files that matplotlib writes. Raises :class:`BenchError` without it."""
    try:
        from matplotlib import figure
    except ImportError as error:
        raise BenchError(
            f"--plot needs matplotlib ({error}): pip install 'datadist[bench]'"
        ) from None
    found: dict[str, str] = figure.Figure().canvas.get_supported_filetypes()
    return list(found)


def plot(results: Sequence[Result], path: Path, title: str) -> None:
    """Draw what was measured; :func:`check_plot` says beforehand whether that can be done."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    panels = _panels(results)
    across, down = min(ACROSS, len(panels)), -(-len(panels) // ACROSS)
    with mpl.rc_context(STYLE):  # type: ignore[arg-type,unused-ignore]
        figure = Figure(figsize=(6.4 * across, 4.6 * down + 0.4), layout="constrained")
        axes = list(figure.subplots(down, across, squeeze=False).flat)
        for draw, axis in zip(panels, axes, strict=False):
            draw(axis)
        for unused in axes[len(panels) :]:
            unused.set_axis_off()
        figure.suptitle(
            textwrap.fill(title, 72 * across), x=0.01, ha="left", color=SOFT, fontsize=9
        )
        figure.savefig(path, dpi=130)


def _panels(results: Sequence[Result]) -> list[Callable[[Any], None]]:
    sizes = [r for r in results if isinstance(r, ScalePoint) and r.curve == "segment-bytes"]
    small = [r for r in results if isinstance(r, Latency)]
    large = [r for r in results if isinstance(r, Throughput)]
    panels: list[Callable[[Any], None]] = []
    if large:
        panels.append(lambda axis: _draw_throughput(axis, large))
    if sizes:
        panels.append(lambda axis: _draw_sizes(axis, sizes))
    panels += [partial(_draw_latency, result) for result in small]
    return panels


def _draw_throughput(axis: Any, results: list[Throughput]) -> None:
    """Bars of transfers, and of the copies of as many bytes that they were measured beside."""
    names = [name for name in results[0].limits if not name.endswith(" kernel")]
    width = 0.84 / (1 + len(names))
    places = range(len(results))
    for number, name in enumerate(("", *names)):
        series = [result.limits[name] if name else result.warm for result in results]
        rates = [r.rate(s.median) for r, s in zip(results, series, strict=True)]
        low = [
            max(0.0, m - r.rate(s.worst)) for m, r, s in zip(rates, results, series, strict=True)
        ]
        high = [
            max(0.0, r.rate(s.best) - m) for m, r, s in zip(rates, results, series, strict=True)
        ]
        bars = axis.bar(
            [place + number * width for place in places], rates, width * 0.9, yerr=[low, high],
            color=REFERENCES[(number - 1) % 3] if name else OURS, label=name or "transfers",
            error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2},
        )  # fmt: skip
        axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    axis.set_xticks([place + 0.42 - width / 2 for place in places], [r.workload for r in results])
    axis.set_ylabel("GB/s, median; lines: slowest to fastest")
    axis.set_title("Throughput beside copies of as many bytes")
    axis.margins(y=0.2)
    axis.legend(frameon=False, ncols=2, loc="upper left", fontsize=8)


def _draw_sizes(axis: Any, points: list[ScalePoint]) -> None:
    x = [point.x for point in points]
    ours = [point.nbytes / point.seconds.median / 1e9 for point in points]
    low = [point.nbytes / point.seconds.worst / 1e9 for point in points]
    high = [point.nbytes / point.seconds.best / 1e9 for point in points]
    copies = [p.nbytes / p.limit.median / 1e9 if p.limit else None for p in points]
    axis.fill_between(x, low, high, color=OURS, alpha=0.15, linewidth=0, label="slowest to fastest")
    axis.plot(x, ours, color=OURS, marker="o", markersize=4, label="transfers, median")
    if any(copies):
        axis.plot(x, copies, color=SOFT, linestyle="--", label=f"{points[0].limit_name}, median")
    axis.set_xscale("log", base=2)
    marks = x[:: max(1, len(x) // 5)]
    axis.set_xticks(marks, [_size(value) for value in marks])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel("bytes of a segment")
    axis.set_ylabel("GB/s")
    axis.set_title("Throughput by size of segments")
    axis.legend(frameon=False, fontsize=8)


def _draw_latency(result: Latency, axis: Any) -> None:
    micros = sorted(second * 1e6 for second in result.seconds)
    marks = percentiles(micros)
    axis.hist([value for value in micros if value <= marks["p99"]], bins=60, color=OURS, alpha=0.85)
    for name, style in (("p50", "-"), ("p99", ":")):
        axis.axvline(marks[name], color=INK, linewidth=1, linestyle=style,
                     label=f"{name.upper()} {marks[name]:.1f} us")  # fmt: skip
    axis.set_xlabel("microseconds of the whole call (fastest 99 %)")
    axis.set_ylabel("transfers")
    axis.set_title("Latency of a block of 4 KiB")
    axis.legend(frameon=False, fontsize=8)


def _size(value: int) -> str:
    for unit, size in (("Mi", 1 << 20), ("Ki", 1 << 10)):
        if value >= size:
            return f"{value // size} {unit}B"
    return f"{value} B"

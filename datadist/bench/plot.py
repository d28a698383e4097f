"""Plots of results: one file, with a panel for each kind of result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datadist.bench.measured_engine import BenchError
from datadist.bench.results import Latency, Result, ScalePoint, Throughput

INK, SOFT, OURS, LIMIT = "#22252a", "#8a919c", "#1f6feb", "#c4c9d1"


def plot(results: Sequence[Result], path: Path, title: str) -> None:
    """Draw what was measured. Raises :class:`BenchError` without matplotlib or anything to draw."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise BenchError("--plot needs matplotlib: pip install datadist[bench]") from None
    panels = _panels(results)
    if not panels:
        raise BenchError("nothing that was measured can be drawn: run contiguous, latency or scale")
    style: dict[str, Any] = {
        "font.size": 10, "axes.edgecolor": SOFT, "axes.labelcolor": INK, "text.color": INK,
        "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
        "axes.spines.right": False, "axes.titlelocation": "left", "axes.titleweight": "bold",
    }  # fmt: skip
    with mpl.rc_context(style):  # type: ignore[arg-type,unused-ignore]
        figure = Figure(figsize=(6.2 * len(panels), 4.6), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for draw, axis in zip(panels, axes, strict=True):
            draw(axis)
        figure.suptitle(title, x=0.01, ha="left", color=SOFT)
        figure.savefig(path, dpi=130)


def _panels(results: Sequence[Result]) -> list[Callable[[Any], None]]:
    sizes = [r for r in results if isinstance(r, ScalePoint) and r.curve == "segment-bytes"]
    small = [r for r in results if isinstance(r, Latency)]
    large = [r for r in results if isinstance(r, Throughput)]
    panels: list[Callable[[Any], None]] = []
    if sizes:
        panels.append(lambda axis: _draw_sizes(axis, sizes))
    if small:
        panels.append(lambda axis: _draw_latency(axis, small[0]))
    if large:
        panels.append(lambda axis: _draw_ratios(axis, large))
    return panels


def _draw_sizes(axis: Any, points: list[ScalePoint]) -> None:
    x = [point.x for point in points]
    ours = [point.nbytes / point.seconds.median / 1e9 for point in points]
    low = [point.nbytes / point.seconds.worst / 1e9 for point in points]
    high = [point.nbytes / point.seconds.best / 1e9 for point in points]
    limit = [p.nbytes / p.limit.median / 1e9 if p.limit else None for p in points]
    axis.fill_between(x, low, high, color=OURS, alpha=0.15, linewidth=0)
    axis.plot(x, limit, color=SOFT, linestyle="--", label=points[0].limit_name)
    axis.plot(x, ours, color=OURS, marker="o", markersize=4, label="transfer")
    axis.set_xscale("log", base=2)
    marks = x[::3]
    axis.set_xticks(marks, [_size(value) for value in marks])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("bytes of a segment")
    axis.set_ylabel("GB/s")
    axis.set_title("Throughput by size of segments")
    axis.legend(frameon=False)


def _draw_latency(axis: Any, result: Latency) -> None:
    micros = sorted(second * 1e6 for second in result.seconds)
    shown = micros[: int(0.99 * len(micros)) or 1]
    axis.hist(shown, bins=60, color=OURS, alpha=0.85)
    middle = micros[len(micros) // 2]
    axis.axvline(middle, color=INK, linewidth=1)
    axis.annotate(
        f"median {middle:.1f} us", (middle, 0.95), xycoords=("data", "axes fraction"),
        xytext=(6, 0), textcoords="offset points",
    )  # fmt: skip
    axis.set_xlabel("microseconds (fastest 99 %)")
    axis.set_ylabel("transfers")
    axis.set_title("Latency of one block of 4 KiB")


def _draw_ratios(axis: Any, results: list[Throughput]) -> None:
    names = [name for name in results[0].limits if not name.endswith(" kernel")]
    width = 0.8 / max(1, len(names))
    shades = [OURS, "#7aa7f0", LIMIT]
    for place, name in enumerate(names):
        x = [group + place * width for group in range(len(results))]
        values = [result.ratios().get(name, 0.0) for result in results]
        bars = axis.bar(x, values, width * 0.92, color=shades[place % 3], label=f"of {name}")
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axis.axhline(1, color=INK, linewidth=1)
    axis.set_xticks(
        [group + 0.4 - width / 2 for group in range(len(results))], [r.workload for r in results]
    )
    axis.set_ylabel("speed of transfers over that of the limit")
    axis.set_title("Ratio to the limits of the same run")
    axis.margins(y=0.22)
    axis.legend(frameon=False, ncols=len(names), loc="upper left", fontsize=8)


def _size(value: int) -> str:
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if value >= size:
            return f"{value // size}{unit}"
    return str(value)

"""Memory, descriptors and latency of a soak over time, with the moments of its faults."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.soak.world import Sample, Totals

COLOURS = ("#d1242f", "#9a6700", "#8250df", "#0969da", "#1a7f37", "#bc4c00", "#57606a")
LABELS = {"lost": "loss noticed"}
PER_PROCESS = "mean of the processes"


def plot(totals: Totals, path: Path) -> None:
    """Write a PNG; needs the extra ``soak`` (matplotlib)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 13), layout="constrained")
    axes = figure.subplots(5, sharex=True, height_ratios=(2, 2, 2, 3, 2))
    samples = [sample for sample in totals.samples if sample.each]
    _draw_resources(axes, samples)
    _draw_latencies(axes[3], totals.latencies)
    _draw_faults(axes, totals.moments)
    for axis in axes[:3]:
        axis.set_ylim(bottom=0)
    axes[-1].set_xlabel(
        "seconds since the begin; vertical lines: a process was killed, stopped or cut off"
    )
    figure.suptitle(_title(totals), x=0.01, ha="left")
    figure.savefig(path, dpi=100)


def _title(totals: Totals) -> str:
    compared = sum(found.transfers for found in totals.compared.values())
    state = "FAILED" if totals.failed else "passed"
    return (
        f"Soak, {state}: {totals.steps.total()} steps, {compared} transfers compared, "
        f"{totals.wrong} bytes lost or wrong, {totals.faults.total()} faults, "
        f"{len(totals.leaks)} leaks, {len(totals.problems)} problems"
    )


def _draw_resources(axes: Sequence[Any], samples: Sequence[Sample]) -> None:
    times = [sample.seconds for sample in samples]

    def mean(name: str) -> list[float]:
        return [sum(getattr(u, name) for u in s.each) / len(s.each) for s in samples]

    axes[0].set_title(f"Resident memory, {PER_PROCESS}", loc="left")
    axes[0].plot(times, [value / 2**20 for value in mean("resident")])
    axes[0].set_ylabel("MiB")
    axes[1].set_title(f"Descriptors and threads, {PER_PROCESS}; how many processes", loc="left")
    axes[1].plot(times, mean("descriptors"), label="descriptors")
    axes[1].plot(times, mean("threads"), label="threads")
    axes[1].step(times, [len(s.each) for s in samples], color="grey", label="processes")
    axes[1].set_ylabel("number")
    axes[1].legend(loc="upper left", fontsize="small", ncols=3)
    axes[2].set_title(f"Mappings, {PER_PROCESS}", loc="left")
    axes[2].plot(times, mean("mappings"))
    axes[2].set_ylabel("number")


def _draw_latencies(axis: Any, latencies: Sequence[tuple[float, str, float]]) -> None:
    axis.set_title("How long each operation took", loc="left")
    axis.set_ylabel("ms")
    axis.set_yscale("log")
    for what in sorted({what for _, what, _ in latencies}):
        points = [(at, seconds * 1e3) for at, name, seconds in latencies if name == what]
        axis.scatter(*zip(*points, strict=True), s=8, label=LABELS.get(what, what))
    if latencies:
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")


def _draw_faults(axes: Sequence[Any], moments: Sequence[tuple[float, str]]) -> None:
    """A row of marks for each kind of fault; those that end or cut off a process through all panels."""
    *above, axis = axes
    axis.set_title("Faults", loc="left")
    kinds = sorted({kind for _, kind in moments}, reverse=True)
    for row, kind in enumerate(kinds):
        colour = COLOURS[row % len(COLOURS)]
        times = [at for at, name in moments if name == kind]
        axis.scatter(times, [row] * len(times), marker="|", s=90, color=colour)
        if kind.startswith(("killed", "stopped", "connection")):
            for each in above:
                each.vlines(times, 0, 1, transform=each.get_xaxis_transform(), color=colour,
                            linewidth=0.6, alpha=0.4)  # fmt: skip
    axis.set_yticks(range(len(kinds)), kinds)
    axis.set_ylim(-0.7, max(0, len(kinds) - 1) + 0.7)

"""Memory, descriptors and latency of a soak over time."""

from __future__ import annotations

from pathlib import Path

from tests.soak.world import Totals


def plot(totals: Totals, path: Path) -> None:
    """Write a PNG; needs the extra ``soak`` (matplotlib)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, sharex=True, figsize=(10, 9), layout="constrained")
    times = [sample.seconds for sample in totals.samples]
    each = [max(1, sample.processes) for sample in totals.samples]
    axes[0].plot(times, [s.resident / n / 2**20 for s, n in zip(totals.samples, each, strict=True)])
    axes[0].set_ylabel("resident MiB per process")
    axes[1].plot(times, [s.descriptors / n for s, n in zip(totals.samples, each, strict=True)])
    axes[1].plot(times, [s.processes for s in totals.samples], color="grey", linewidth=0.8)
    axes[1].set_ylabel("descriptors per process;\nprocesses (grey)")
    for what in sorted({what for _, what, _ in totals.latencies}):
        points = [(at, seconds * 1e3) for at, name, seconds in totals.latencies if name == what]
        axes[2].scatter(*zip(*points, strict=True), s=8, label=what)
    axes[2].set_yscale("log")
    axes[2].set_ylabel("latency, ms")
    axes[2].set_xlabel("seconds")
    if totals.latencies:
        figure.legend(loc="outside lower center", ncol=8, fontsize="small")
    for axis in axes[:2]:
        axis.set_ylim(bottom=0)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)

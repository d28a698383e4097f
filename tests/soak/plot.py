"""Memory, descriptors and latency of a soak over time."""

from __future__ import annotations

from pathlib import Path

from tests.soak.world import Totals


def plot(totals: Totals, path: Path) -> None:
    """Write a PNG; needs the extra ``soak`` (matplotlib)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(4, sharex=True, figsize=(10, 11), layout="constrained")
    samples = [sample for sample in totals.samples if sample.each]
    times = [sample.seconds for sample in samples]

    def mean(name: str) -> list[float]:
        return [sum(getattr(u, name) for u in s.each) / len(s.each) for s in samples]

    axes[0].plot(times, [value / 2**20 for value in mean("resident")])
    axes[0].set_ylabel("resident MiB per process")
    axes[1].plot(times, mean("descriptors"), label="descriptors")
    axes[1].plot(times, mean("threads"), label="threads")
    axes[1].plot(times, [len(s.each) for s in samples], color="grey", label="processes")
    axes[1].set_ylabel("per process")
    axes[1].legend(loc="upper left", fontsize="small")
    axes[2].plot(times, mean("mappings"))
    axes[2].set_ylabel("mappings per process")
    for what in sorted({what for _, what, _ in totals.latencies}):
        points = [(at, seconds * 1e3) for at, name, seconds in totals.latencies if name == what]
        axes[3].scatter(*zip(*points, strict=True), s=8, label=what)
    axes[3].set_yscale("log")
    axes[3].set_ylabel("latency, ms")
    axes[3].set_xlabel("seconds")
    if totals.latencies:
        figure.legend(loc="outside lower center", ncol=8, fontsize="small")
    for axis in axes[:3]:
        axis.set_ylim(bottom=0)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)

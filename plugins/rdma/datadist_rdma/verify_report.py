"""Output and thresholds of the verification."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

MIB = 1 << 20
ROUNDS = 3
RATIO = 0.9
"""Share of the throughput of ib_read_bw that counts as good."""


class Report:
    """Lines with a mark, and whether all were good."""

    def __init__(self) -> None:
        self.failed = 0

    def line(self, mark: str, what: str, detail: str = "") -> None:
        """Print one line; the mark FAIL counts."""
        self.failed += mark == "FAIL"
        print(f"{mark:5} {what}{': ' if detail else ''}{detail}", flush=True)

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[list[str]]:
        """A step that fails where it raises; texts appended to the list are its detail."""
        detail: list[str] = []
        try:
            yield detail
        except Exception as error:
            self.line("FAIL", what, f"{type(error).__name__}: {error}")
        else:
            self.line("ok", what, ", ".join(detail))


def rate(bytes_per_second: float) -> str:
    """Bytes per second for people."""
    if bytes_per_second < 1e9:
        return f"{bytes_per_second / 1e6:.1f} MB/s"
    return f"{bytes_per_second / 1e9:.2f} GB/s"

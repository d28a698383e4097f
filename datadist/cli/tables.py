"""Plain text tables."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence

LEAST = 20
"""Characters of the last column below which it is not wrapped."""


def render(
    header: Sequence[str], rows: Sequence[Sequence[object]], width: int | None = None
) -> str:
    """Columns as wide as their widest cell; with ``width`` the last one is wrapped to fit."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    room = None if width is None else width - sum(each + 2 for each in widths[:-1])
    lines = []
    for row in cells:
        last = [row[-1]] if room is None or room < LEAST else textwrap.wrap(row[-1], room) or [""]
        first = [*row[:-1], last[0]]
        for line in (first, *([*[""] * (len(row) - 1), more] for more in last[1:])):
            lines.append("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)))
    return "\n".join(line.rstrip() for line in lines)


def output_width() -> int | None:
    """Columns of the terminal that is written to; None for files and pipes, where a row is a line."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return shutil.get_terminal_size().columns if is_terminal else None

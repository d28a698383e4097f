"""Text for people: tables and paragraphs that fit the terminal, however narrow it is."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence

from datadist.cli.style import TITLE, Styled, paint

GAP = "  "
UNDER = " " * 6
"""Before a last column that stands under its row."""
NUMBER = re.compile(r"[<-]?\d*\.?\d+%?( [num]?s)?|-")


def render(
    header: Sequence[str], rows: Sequence[Sequence[object]], width: int | None = None
) -> str:
    """Columns as wide as their widest cell, numbers to the right.

    With ``width`` it fits: the last column is wrapped, or stands under its row; or each row becomes
    a list of its cells.
    """
    if not header:
        return ""
    cells = [[each if isinstance(each, str) else str(each) for each in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    rights = [
        bool(rows) and all(NUMBER.fullmatch(row[i]) for row in cells) for i in range(len(header))
    ]
    before = sum(each + len(GAP) for each in widths[:-1])
    room = None if width is None else width - before
    if width is None or room is None or room >= min(widths[-1], max(20, width * 2 // 5)):
        lines = _columns(header, cells, widths, rights, room)
    elif room >= 0 and len(header) > 2:
        lines = _last_below(header, cells, widths, rights, width)
    else:
        lines = _lists(header, cells, width)
    return "\n".join(lines)


def _columns(
    header: Sequence[str], rows: list[list[str]], widths: list[int], rights: list[bool],
    room: int | None,
) -> list[str]:  # fmt: skip
    lines = [_title(header, widths, rights)]
    for row in rows:
        first, *more = _wrapped(row[-1], room) if room else [row[-1]]
        lines.append(_line([*row[:-1], _like(row[-1], first)], widths, rights))
        lines += [" " * (sum(widths[:-1]) + len(GAP) * (len(row) - 1)) + each for each in more]
    return lines


def _last_below(
    header: Sequence[str], rows: list[list[str]], widths: list[int], rights: list[bool], width: int
) -> list[str]:
    lines = [_title(header[:-1], widths, rights)]
    for row in rows:
        lines.append(_line(row[:-1], widths, rights))
        lines += [UNDER + each for each in _wrapped(row[-1], width - len(UNDER)) if each]
    return lines


def _lists(header: Sequence[str], rows: list[list[str]], width: int) -> list[str]:
    lines: list[str] = []
    for row in rows:
        lines += [""] if lines else []
        for title, cell in zip(header, row, strict=True):
            if cell:
                lines += paragraph(f"{title}: {cell}" if title else cell, width, "  ").splitlines()
    return lines


def _title(header: Sequence[str], widths: list[int], rights: list[bool]) -> str:
    return paint(_line(header, widths, rights), TITLE)


def _line(cells: Sequence[str], widths: list[int], rights: list[bool]) -> str:
    padded = []
    for cell, width, right in zip(cells, widths, rights, strict=False):
        space = " " * (width - len(cell))
        text = paint(cell, cell.code) if isinstance(cell, Styled) else cell
        padded.append(space + text if right else text + space)
    return GAP.join(padded).rstrip()


def _like(cell: str, text: str) -> str:
    return Styled(text, cell.code) if isinstance(cell, Styled) else text


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(1, width), break_on_hyphens=False) or [""]


def paragraph(text: str, width: int | None, indent: str = "") -> str:
    """The text in lines of ``width``, all but the first indented; in one line without a width."""
    if width is None:
        return text
    lines = textwrap.wrap(
        text, max(width, len(indent) + 8), subsequent_indent=indent, break_on_hyphens=False
    )
    return "\n".join(lines)


def say(text: str, indent: str = "  ", code: str = "") -> None:
    """Print a paragraph as wide as what is written to, in that style."""
    lines = paragraph(text, output_width(), indent)
    print(paint(lines, code) if code else lines, flush=True)


def output_width() -> int | None:
    """Columns of the terminal that is written to; None for files and pipes, where a row is a line."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return size_of_terminal().columns if is_terminal else None


def size_of_terminal() -> os.terminal_size:
    """As it is now, where the terminal says so: COLUMNS and LINES are of when a shell began."""
    with contextlib.suppress(OSError):
        size = os.get_terminal_size(sys.stdout.fileno())
        if size.columns and size.lines:
            return size
    return shutil.get_terminal_size()

"""Colours of a terminal: a few codes, where it has them.

The variables are those of other programs: ``NO_COLOR`` wins over ``FORCE_COLOR``, and both over what
the terminal is.
"""

from __future__ import annotations

import os
import re
import sys
from typing import TextIO

GOOD, WARN, BAD, TITLE, SOFT = "32", "33", "31", "1", "2"
"""Green, yellow, red, bold, faint."""


class Styled(str):
    """The text of a cell with its code: as long as it looks."""

    __slots__ = ("code",)
    code: str

    def __new__(cls, text: str, code: str) -> Styled:
        made = super().__new__(cls, text)
        made.code = code
        return made


def coloured(stream: TextIO | None) -> bool:
    """Whether codes may be written there."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def cut(text: str, width: int) -> str:
    """As many characters as that, not counting codes, which are all kept."""
    kept, left = [], width
    for part in re.split(r"(\x1b\[[0-9;]*m)", text):
        if part.startswith("\x1b"):
            kept.append(part)
        else:
            kept.append(part[:left])
            left -= len(kept[-1])
    return "".join(kept)


def paint(text: str, code: str, stream: TextIO | None = None) -> str:
    """The text in that style, where ``stream`` (default: standard output) has styles."""
    return f"\x1b[{code}m{text}\x1b[0m" if text and coloured(stream or sys.stdout) else text

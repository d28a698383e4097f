"""The base of the API's numbered enumerations: texts show names, on every version of Python."""

from __future__ import annotations

import re
from enum import IntEnum

__all__ = ["NamedInt"]

_FOR_TEXT = re.compile(r"(.?[<>^])?([1-9]\d*)?(\.\d+)?s?", re.DOTALL)
"""Format specifications that make sense for a text: all but those of numbers."""


class NamedInt(IntEnum):
    """An integer whose text is ``Kind.NAME``: ``str``, ``%s``, and f-strings with or without width.

    ``%d`` and format specifications of numbers (``d``, ``#x``, ``08``, ``,``) show the number.
    """

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    def __format__(self, spec: str) -> str:
        if _FOR_TEXT.fullmatch(spec):
            return format(str(self), spec)
        return format(int(self), spec)

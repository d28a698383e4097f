"""Parsing of decimal numbers: only ASCII digits are accepted.

`int` also accepts blanks, signs, underscores and digits of other scripts: ``" 2_6000"`` is 26000.
"""

from __future__ import annotations

from collections.abc import Callable

from datadist.base.texts import short_repr

__all__ = ["is_digits", "number_argument", "parse_digits"]

MAX_DIGITS = 20
"""Most digits of a number; all numbers of the API are shorter."""


def is_digits(text: str) -> bool:
    """Whether this is a number without a sign, however long."""
    return text.isascii() and text.isdecimal()


def parse_digits(text: str) -> int | None:
    """A number of at most 20 digits; None for any other text."""
    return int(text) if is_digits(text) and len(text) <= MAX_DIGITS else None


def number_argument(low: int, high: int = 2**63 - 1) -> Callable[[str], int]:
    """The ``type`` of a command-line option that is a number in ``[low, high]``."""

    def parse(text: str) -> int:
        from argparse import (
            ArgumentTypeError,
        )  # imported here so that `import datadist` stays fast

        number = parse_digits(text)
        if number is None or not low <= number <= high:
            raise ArgumentTypeError(f"{short_repr(text)} is not a number in [{low}, {high}]")
        return number

    return parse

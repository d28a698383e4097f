"""Checks of a transport's own options, ``datadist.<backend>.<name>``, with core's error texts.

For transports. Each function raises :class:`~datadist.transport.OptionError`, which `init` reports
as LLM_PARAM_INVALID.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from datadist.base.digits import parse_digits
from datadist.base.texts import nearest, short_repr
from datadist.transport import OptionError

__all__ = ["choice", "number", "refuse_unknown"]


def refuse_unknown(backend: str, given: Mapping[str, str], known: Mapping[str, str]) -> None:
    """Raise for the first option that is not in ``known``, which maps names to descriptions."""
    for name in sorted(set(given) - set(known)):
        near = nearest(name, known, cutoff=0.6)
        hint = f"did you mean datadist.{backend}.{near}? " if near else ""
        options = "; ".join(f"{each}: {text}" for each, text in known.items())
        raise OptionError(
            f"unknown option datadist.{backend}.{name}; {hint}there are {options or 'none'}"
        )


def number(name: str, text: str, low: int, high: int) -> int:
    """A number in ``[low, high]``; ``name`` says whose, such as ``option datadist.shm.threads``."""
    value = parse_digits(text)
    if value is not None and low <= value <= high:
        return value
    raise OptionError(f"{name} is {short_repr(text)}, it must be a number in [{low}, {high}]")


def choice(name: str, text: str, values: Sequence[str]) -> str:
    """One of ``values``."""
    if text in values:
        return text
    wanted = " or ".join(f'"{value}"' for value in values)
    raise OptionError(f"{name} is {short_repr(text)}, it must be {wanted}")

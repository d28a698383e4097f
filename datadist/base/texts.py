"""Parts of messages: values, similar names, times."""

from __future__ import annotations

from collections.abc import Iterable

from datadist.base.callers import pass_on

__all__ = ["MAX_SHOWN", "in_seconds", "nearest", "short_repr", "suggestion"]

MAX_SHOWN = 200
"""Most characters of a value in a message."""
MAX_LIST_ELEMENTS = 32
"""Most elements of a list in a message."""


def short_repr(value: object) -> str:
    """``repr(value)`` in one line and of bounded length, also where the value's own repr fails."""
    if isinstance(value, (str, bytes)):
        return _shortened(repr(value[: MAX_SHOWN + 1]), len(value))
    if isinstance(value, (list, tuple, set, frozenset, dict)) and len(value) > MAX_LIST_ELEMENTS:
        return f"{len(value)} elements"
    try:
        text = " ".join(repr(value).split())
    except Exception as error:
        pass_on(error)
        return f"<its repr raised {type(error).__name__}>"
    return _shortened(text, len(text))


def _shortened(text: str, length: int) -> str:
    if len(text) <= MAX_SHOWN:
        return text
    return f"{text[:MAX_SHOWN]}... ({length} characters in all)"


def nearest(name: str, names: Iterable[str], cutoff: float = 0.7) -> str | None:
    """The most similar name, ignoring case; None if no name is similar."""
    import difflib  # imported here so that `import datadist` stays fast

    by_lower = {each.lower(): each for each in names}
    found = difflib.get_close_matches(name[:MAX_SHOWN].lower(), by_lower, 1, cutoff)
    return by_lower[found[0]] if found else None


def suggestion(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """``: did you mean '...'?``; empty if no name is similar."""
    near = nearest(name, names, cutoff)
    return f": did you mean {near!r}?" if near else ""


def in_seconds(value: float) -> str:
    """A time in seconds, rounded to three digits or to whole seconds: ``6 s``, ``1.5 s``, ``1080 s``."""
    if 0 < value < 0.001:
        return "less than 0.001 s"
    return f"{value:.0f} s" if value >= 100 else f"{value:.3g} s"

"""Unknown keywords of public methods: the ``TypeError`` lists the valid keywords.

Python's own text names only the wrong keyword. Methods of small transfers take ``**unknown`` and
refuse it themselves, since a wrapper function would cost a tenth of a microsecond. Type checkers,
`inspect.signature` and `typing.get_type_hints` do not see this parameter. If a required argument is
missing too, Python's text is kept, which names the missing argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from types import FunctionType
from typing import Any, TypedDict, TypeVar

from datadist.base.texts import nearest

__all__ = ["NoKeywords", "did_you_mean", "keywords_of", "named_keywords", "unknown_keyword"]

Kind = TypeVar("Kind", bound=type)

UNKNOWN = "unknown"
"""The parameter of methods that refuse unknown keywords themselves: ``**unknown: Unpack[NoKeywords]``."""


class NoKeywords(TypedDict):
    """Tells type checkers that no keyword is allowed there."""


def named_keywords(kind: Kind) -> Kind:
    """Decorate a class: its constructor and public methods raise :func:`unknown_keyword`."""
    for name, member in list(vars(kind).items()):
        if name.startswith("_") and name != "__init__":
            continue
        shown = kind.__name__ if name == "__init__" else name
        if isinstance(member, FunctionType):
            setattr(kind, name, _refusing(member, shown))
        elif isinstance(member, (classmethod, staticmethod)):
            setattr(kind, name, type(member)(_refusing(member.__func__, shown)))
    return kind


def unknown_keyword(shown: str, known: Sequence[str], unknown: Iterable[str]) -> TypeError:
    """The exception for a call of ``shown`` with ``unknown`` keywords; the first one is named."""
    name = next(iter(unknown))
    takes = f"it takes {', '.join(known)}" if known else "it takes none"
    return TypeError(
        f"{shown}() got an unexpected keyword argument {name!r}{did_you_mean(name, known)}: {takes}"
    )


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """`` (did you mean 'nearest'?)`` if one of the names is similar, else nothing."""
    near = nearest(name, known, cutoff=0.6)
    return f" (did you mean {near!r}?)" if near else ""


def keywords_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """Parameters that may be given by name, without ``self`` or ``cls``."""
    code = function.__code__
    names = code.co_varnames[code.co_posonlyargcount : code.co_argcount + code.co_kwonlyargcount]
    return tuple(name for name in names if name not in ("self", "cls"))


def _refusing(function: Callable[..., Any], shown: str) -> Callable[..., Any]:
    if UNKNOWN in function.__code__.co_varnames:
        function.__signature__ = _without_unknown(function)  # type: ignore[attr-defined]
        del function.__annotations__[UNKNOWN]  # hidden from readers of type hints
        return function
    known = keywords_of(function)
    allowed = frozenset((*known, "self", "cls"))

    @wraps(function)
    def checked_call(*args: Any, **kwargs: Any) -> Any:
        if kwargs and not kwargs.keys() <= allowed:
            raise unknown_keyword(shown, known, [name for name in kwargs if name not in allowed])
        return function(*args, **kwargs)

    return checked_call


def _without_unknown(function: Callable[..., Any]) -> Any:
    from inspect import signature

    full = signature(function)
    return full.replace(parameters=[p for p in full.parameters.values() if p.name != UNKNOWN])

"""Validation of JSON from peers and files, with a bounded cost for any content.

pydantic records every fault, which costs more than a microsecond and a hundred bytes each. So a
text with too many elements or members is refused before pydantic parses it. Sequences of models
stop at the first fault (``fail_fast``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import from_json

from datadist.base.pydantic_plugins import load_pydantic_plugins

__all__ = ["MAX_MEMBERS", "parse"]

T = TypeVar("T")
load_pydantic_plugins()  # before the modules that parse define their models

MAX_MEMBERS = 32
"""Members of one object: more than any message has."""
SMALL = 1024
"""A text of this size in bytes cannot contain enough faults to be expensive."""


def parse(text: bytes, most: int, validate: Callable[[bytes], T]) -> T:
    """What ``validate`` (a model's ``model_validate_json``) makes of a JSON text.

    The text has at most ``most`` commas and opening brackets and braces, those inside of strings too.

    Raises ``ValueError``, in one line of bounded length, which names the first fault.
    """
    if len(text) > SMALL:
        _check_shape(text, most)
    try:
        return validate(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "text"
        raise ValueError(f"{place[:100]}: {first['msg'][:200]}".replace("\n", " ")) from None


def _check_shape(text: bytes, most: int) -> None:
    elements = sum(map(text.count, (b",", b"[", b"{")))
    if elements > most:
        raise ValueError(f"it has {elements} elements, more than {most}")
    try:
        level = [from_json(text, cache_strings="keys")]
    except ValueError as error:
        raise ValueError(f"text: Invalid JSON: {error}"[:200]) from None
    while level:
        below: list[object] = []
        for value in level:
            if type(value) is dict:
                if len(value) > MAX_MEMBERS:
                    raise ValueError(f"an object has {len(value)} members, more than {MAX_MEMBERS}")
                below += value.values()
            elif type(value) is list:
                below += value
        level = below

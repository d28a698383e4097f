"""The options of memory pools: JSON text to bytes and pages."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from datadist.base import hints
from datadist.base.pydantic_plugins import load_pydantic_plugins
from datadist.base.texts import nearest, short_repr
from datadist.transports.option_keys import wrong

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

__all__ = ["PoolConfig", "parse_pool"]

log = logging.getLogger("datadist.options")

load_pydantic_plugins()
MAX_TEXT = 4096
"""Characters of the option."""


class PoolConfig(BaseModel):
    """A memory pool: bytes, and the page size as a power of two (64 KiB by default).

    Limits: LLM-DataDist API, memory pools.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    memory_size: int = Field(gt=0)
    page_shift: int = Field(default=16, ge=10, lt=31)

    @property
    def page_size(self) -> int:
        """Bytes of a page."""
        return 1 << self.page_shift


def parse_pool(given: Mapping[str, str], key: str) -> PoolConfig | None:
    """The pool of an option; None without it.

    Fields that do not exist are passed over, as upstream does, with a warning where one is alike.

    Raises LLM_PARAM_INVALID.
    """
    text = given.get(key)
    if text is None:
        return None
    if len(text) > MAX_TEXT:
        raise wrong(key, text, f"it has {len(text)} characters, more than {MAX_TEXT}")
    try:
        pool = PoolConfig.model_validate_json(text)
    except ValidationError as error:
        raise wrong(key, text, "; ".join(_problem(item, text) for item in error.errors())) from None
    if pool.memory_size >> pool.page_shift >= 2**32 - 1:
        raise wrong(key, text, f"{pool.memory_size} bytes are too many pages, raise page_shift")
    _warn_of_misspelt(key, text)
    return pool


def _problem(item: ErrorDetails, text: str) -> str:
    """One fault, at its field, with what was given there and what may have been meant."""
    field = ".".join(map(str, item["loc"])) or "text"
    return f"{field}: {item['msg']}{_details(item, text)}"


def _details(item: ErrorDetails, text: str) -> str:
    value: Any = item["input"]
    if item["type"] == "json_invalid":
        why = hints.for_json_text(text)
        return _bytes_meant(text) or (f", {why}" if why else "")
    if item["type"] == "missing":
        near = nearest(str(item["loc"][-1]), value) if isinstance(value, dict) else None
        return f", and {near!r} is none of the fields" if near else ""
    if not item["loc"]:
        return _bytes_meant(value)
    return f", not {short_repr(value)}{_bytes_meant(value) if 'memory_size' in item['loc'] else ''}"


_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def _bytes_meant(value: object) -> str:
    """A size such as "1GB" in bytes, for a text."""
    found = re.fullmatch(r"(\d{1,15})(\.0)? *([kmgt]?)i?b?", str(value).strip().lower())
    if found is None or isinstance(value, bool):
        return ""
    return f" (in bytes: {int(found[1]) << 10 * _UNITS[found[3]]})"


def _warn_of_misspelt(key: str, text: str) -> None:
    fields = set(PoolConfig.model_fields)
    for name in set(from_json(text)) - fields:
        near = nearest(name, fields)
        if near:
            log.warning("option %s has a field %s, which has no effect; did you mean %s?",
                        key, short_repr(name), near)  # fmt: skip

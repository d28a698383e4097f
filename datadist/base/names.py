"""Misspelt names: members of enumerations, and attributes of objects.

An unknown name raises ``AttributeError`` with the most similar name.
"""

from __future__ import annotations

import re
from enum import Enum, EnumMeta
from typing import TYPE_CHECKING, Any

from datadist.base.texts import nearest, suggestion

__all__ = ["CheckedAssignment", "CheckedAttributes", "NamedMembers", "member_for"]

_ALIASES = {
    "DataType": {
        "float32": "DT_FLOAT", "fp32": "DT_FLOAT", "f32": "DT_FLOAT", "single": "DT_FLOAT",
        "half": "DT_FLOAT16", "fp16": "DT_FLOAT16", "f16": "DT_FLOAT16",
        "bfloat16": "DT_BF16", "bfloat": "DT_BF16",
        "float64": "DT_DOUBLE", "fp64": "DT_DOUBLE", "f64": "DT_DOUBLE",
        "char": "DT_INT8", "byte": "DT_UINT8", "short": "DT_INT16", "ushort": "DT_UINT16",
        "int": "DT_INT32", "uint": "DT_UINT32", "long": "DT_INT64", "ulong": "DT_UINT64",
        "str": "DT_STRING",
    },
    "LLMRole": {
        "prefill": "PROMPT", "p": "PROMPT", "producer": "PROMPT",
        "decode": "DECODER", "d": "DECODER", "consumer": "DECODER",
        "mixed": "MIX", "both": "MIX", "hybrid": "MIX",
    },
    "Placement": {
        "cpu": "HOST", "dram": "HOST", "ddr": "HOST",
        "npu": "DEVICE", "gpu": "DEVICE", "cuda": "DEVICE", "ascend": "DEVICE", "hbm": "DEVICE",
    },
    "Memtype": {
        "cpu": "MEM_TYPE_HOST", "dram": "MEM_TYPE_HOST", "ddr": "MEM_TYPE_HOST",
        "npu": "MEM_TYPE_DEVICE", "gpu": "MEM_TYPE_DEVICE", "hbm": "MEM_TYPE_DEVICE",
    },
    "RegisterMemStatus": {
        "success": "OK", "succeeded": "OK", "ready": "OK", "done": "OK", "completed": "OK",
        "pending": "PREPARING", "running": "PREPARING", "inprogress": "PREPARING",
        "fail": "FAILED", "failure": "FAILED", "error": "FAILED",
    },
    "LLMStatusCode": {"ok": "LLM_SUCCESS", "invalidparam": "LLM_PARAM_INVALID"},
}  # fmt: skip
"""Names of members in other libraries and other versions, by enumeration, in plain form."""

_PREFIXES = {"DataType": "dt", "LLMStatusCode": "llm", "Memtype": "memtype"}
"""The common prefix of the members of an enumeration, in plain form."""
MAX_LISTED = 16
"""An error text lists all members if there are at most this many and none is similar."""


def _plain(kind: type[Enum], name: str) -> str:
    """A name without its qualifier, the common prefix of the members, case and punctuation."""
    text = re.sub("[^a-z0-9]", "", name.rpartition(".")[2].lower())
    return text.removeprefix(_PREFIXES.get(kind.__name__, "")) or text


def _digits(text: str) -> str:
    return "".join(filter(str.isdigit, text))


def _member_named(kind: type[Enum], name: str) -> str | None:
    """The member that a name probably means; never one of another width (``int4``, ``INT64``)."""
    wanted = _plain(kind, name)
    if alias := _ALIASES.get(kind.__name__, {}).get(wanted):
        return alias
    members = {_plain(kind, member): member for member in kind.__members__}
    same_width = {plain for plain in members if _digits(plain) == _digits(wanted)}
    near = wanted if wanted in members else nearest(wanted, same_width)
    return members[near] if near else None


def member_for(kind: type[Enum], value: object) -> str | None:
    """The member that a value of another type means, as ``DataType.DT_FLOAT16``, or None.

    It accepts numbers of members, names, and element types of other libraries (``torch.float16``,
    ``numpy.dtype("float16")``). It imports none of these libraries.
    """
    if isinstance(value, int) and not isinstance(value, Enum):
        numbered = None if isinstance(value, bool) else kind._value2member_map_.get(value)
        return f"{kind.__name__}.{numbered.name}" if isinstance(numbered, Enum) else None
    name = value.__name__ if isinstance(value, type) else getattr(value, "name", value)
    found = _member_named(kind, str(name)[:100])
    return f"{kind.__name__}.{found}" if found else None


class NamedMembers(EnumMeta):
    """An enumeration whose error for an unknown member names the most similar one."""

    if not TYPE_CHECKING:  # type checkers know the members, and refuse others

        def __getattr__(cls, name: str) -> Any:
            members = cls.__dict__.get("_member_map_", {})
            if name in members:  # Python 3.10 comes here for members, too
                return members[name]
            hint = "" if name.startswith("_") else _members_hint(cls, name)
            raise AttributeError(f"{cls.__name__} has no member {name!r}{hint}", name=name)


def _members_hint(kind: type[Enum], name: str) -> str:
    found = _member_named(kind, name)
    if found:
        return f": did you mean {kind.__name__}.{found}?"
    return f": it has {', '.join(kind.__members__)}" if len(kind) <= MAX_LISTED else ""


class CheckedAssignment:
    """Refuses to set unknown attributes; the error names the most similar attribute.

    Derived classes of users may set any attribute. Names that begin with ``_`` are always allowed.
    Raises ``AttributeError``.
    """

    if not TYPE_CHECKING:  # type checkers know the attributes, and refuse others

        def __setattr__(self, name: str, value: object) -> None:
            if name[:1] != "_" and not hasattr(kind := type(self), name) and _is_ours(kind):
                raise _no_attribute(kind, name)
            object.__setattr__(self, name, value)


class CheckedAttributes(CheckedAssignment):
    """Also suggests the most similar name on reads; this costs some nanoseconds per read."""

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:  # only where Python found nothing
            raise _no_attribute(type(self), name)


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "datadist"


def _no_attribute(kind: type, name: str) -> AttributeError:
    public = [each for each in dir(kind) if not each.startswith("_")]
    hint = "" if name.startswith("_") else suggestion(name, public)
    return AttributeError(f"{kind.__name__} has no attribute {name!r}{hint}", name=name)

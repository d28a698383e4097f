"""Hints for errors about types: what to write instead of the value.

Values of other libraries are recognised by their attributes. None of these libraries is imported
here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import Enum

from datadist.base.callers import pass_on
from datadist.base.names import member_for
from datadist.base.texts import short_repr

__all__ = ["ADDRESSES", "TENSORS", "described", "for_json", "for_json_text", "for_wanted"]

ADDRESSES = "addresses"
"""Integers are expected as addresses of memory, not as numbers."""
TENSORS = "tensors"
"""A list of tensors is expected."""


def described(value: object) -> str | None:
    """An array or tensor by its shape and type of elements; None for anything else."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if isinstance(value, type) or shape is None or dtype is None:
        return None
    try:
        return f"shape {list(shape)}, {dtype}" if len(shape) else None
    except Exception as error:  # ``shape`` is something else
        pass_on(error)
        return None


def for_wanted(value: object, wanted: tuple[type, ...], use: str = "") -> str:
    """How to convert a value to one of the types ``wanted``; empty if no hint is known.

    ``use`` is :data:`ADDRESSES` where integers, or lists of them, are addresses of memory, and
    :data:`TENSORS` where lists are of tensors.
    """
    for kind in wanted:
        if issubclass(kind, Enum):
            found = member_for(kind, value)
            return f"give {found}" if found else ""
    if bool in wanted:
        return _truth(value)
    if list in wanted and (isinstance(value, (tuple, range)) or hasattr(value, "__next__")):
        return "give list(...) of it"
    if not {int, list} & set(wanted):
        return ""
    if use == TENSORS and described(value):
        return "give a list with one tensor for each of the cache"
    if use != ADDRESSES:
        return _number(value, int in wanted)
    address = _address(value)
    many = address and list in wanted
    return (
        f"give [{address}, ...], one address per tensor" if many else address and f"give {address}"
    )


def _address(value: object) -> str:
    kind = type(value)
    if hasattr(kind, "data_ptr"):
        return "tensor.data_ptr()"
    if hasattr(kind, "__cuda_array_interface__"):
        return "array.data.ptr"
    if hasattr(kind, "__array_interface__"):
        return "array.ctypes.data" if getattr(value, "shape", None) else "int(...) of it"
    if isinstance(value, (bytes, bytearray, memoryview)):
        return "numpy.frombuffer(memory, numpy.uint8).ctypes.data"
    if hasattr(kind, "_b_base_"):
        return "ctypes.addressof(memory)"
    return "tensor.address" if kind.__name__ == "CacheTensor" else ""


def _number(value: object, one: bool) -> str:
    """``one``: a single integer is wanted, or may be."""
    kind = type(value)
    if hasattr(kind, "data_ptr"):
        return "give tensor.tolist(), or int(tensor) where it is one number"
    if hasattr(kind, "tolist") and getattr(value, "shape", None):
        return "give array.tolist()"
    whole = isinstance(value, float) and value.is_integer()
    digits = isinstance(value, str) and value.isdecimal()
    return "give int(...) of it" if one and (whole or digits or hasattr(kind, "tolist")) else ""


def _truth(value: object) -> str:
    text = str(value).lower()
    if text in ("1", "true", "yes", "on"):
        return "give True"
    return "give False" if text in ("0", "false", "no", "off") else ""


def for_json(value: object) -> str:
    """How to convert a value to JSON text; empty if no hint is known."""
    if isinstance(value, os.PathLike):
        return "give the text that is in the file, open(path).read()"
    if isinstance(value, (bytes, bytearray)):
        return "give text, .decode() of it"
    if isinstance(value, (Mapping, list, tuple)):
        return "give text, json.dumps(...) of it"
    return "give the text that its .read() returns" if hasattr(value, "read") else ""


def for_json_text(text: str) -> str:
    """Why a text is not JSON, and what to give instead; empty if no hint is known."""
    start = text.lstrip()[:1]
    if not start:
        return "it is empty"
    if start in "{[":
        python = "'" in text and '"' not in text
        return "JSON has double quotes, which json.dumps(...) of a dict writes" if python else ""
    if "\n" not in text and _is_path(text):
        return f"{short_repr(text)} is the name of a file, give the text that is in it, open(path).read()"
    return ""


def _is_path(text: str) -> bool:
    return text.endswith(".json") or "/" in text or os.path.exists(text[:4096].replace("\0", " "))

"""Checks of argument types and integer ranges at the border of the API.

Rules (LLM-DataDist API, type checking): values are checked with ``isinstance``. bool is not
accepted as an integer. None is accepted unless stated otherwise. Range checks raise ``TypeError``
for None and ``ValueError`` for values out of range.
"""

from __future__ import annotations

from operator import index as as_index
from typing import Any, TypeAlias

from datadist.base import hints
from datadist.base.callers import pass_on
from datadist.base.texts import short_repr

Types: TypeAlias = "type | tuple[type, ...]"


def is_a(value: object, types: Types) -> bool:
    """``isinstance``, except that bool is not an int."""
    if isinstance(value, bool):
        return not {bool, object}.isdisjoint(_each(types))
    return isinstance(value, types)


def _each(types: Types) -> tuple[type, ...]:
    return types if isinstance(types, tuple) else (types,)


def check_isinstance(
    name: str, value: object, types: Types, allow_none: bool = True, use: str = ""
) -> None:
    """Raise ``TypeError`` when ``value`` is none of ``types``.

    ``use`` is :data:`hints.ADDRESSES` where an int is an address, :data:`hints.TENSORS` for tensors.
    """
    if type(value) is types or (value is None and allow_none) or is_a(value, types):
        return
    each = _each(types)
    supported = " or ".join(kind.__name__ for kind in each)
    raise _not_supported(name, value, supported, hints.for_wanted(value, each, use))


def check_json(name: str, value: object, allow_none: bool = True) -> None:
    """Raise ``TypeError`` unless ``value`` is text, which is to be JSON."""
    if isinstance(value, str) or (value is None and allow_none):
        return
    raise _not_supported(name, value, "str, which is JSON", hints.for_json(value))


def _not_supported(name: str, value: object, supported: str, hint: str = "") -> TypeError:
    value_text = hints.described(value) or short_repr(value)
    todo = f": {hint}" if hint else ""
    kind = type(value).__name__
    return TypeError(f"{name} is a {kind} ({value_text}), only support {supported}{todo}")


def check_sequence_of(name: str, values: object, element: type, use: str = "") -> None:
    """Raise ``TypeError`` unless ``values`` is a list or tuple of ``element``."""
    check_isinstance(name, values, (list, tuple), allow_none=False, use=use)
    _check_elements(name, values, element, use)


def check_blocks(name: str, values: object) -> None:
    """Raise ``TypeError`` unless ``values`` is a list or tuple of integers, or a flat array of them.

    NumPy's integers are accepted too, since ``list(array)`` contains them. Truth values are not
    accepted.
    """
    if isinstance(values, (list, tuple)):
        _check_indices(name, values)
        return
    import numpy as np  # imported here so that `import datadist` stays fast

    if not isinstance(values, np.ndarray):
        hint = hints.for_wanted(values, (list, tuple))
        raise _not_supported(name, values, "list, tuple or NumPy array of integers", hint)
    if values.dtype.kind not in "iu" or values.ndim != 1:
        raise TypeError(
            f"{name} is an array of {values.dtype} of shape {values.shape}, only support integers in "
            "one dimension"
        )


def _check_indices(name: str, values: list[Any] | tuple[Any, ...]) -> None:
    if _all_are(values, int):
        return
    for place, value in enumerate(values):
        if not is_index(value):
            check_isinstance(f"{name}[{place}]", value, int, allow_none=False)


def is_index(value: object) -> bool:
    """Whether the value is an integer of Python or NumPy, and not a truth value."""
    try:
        as_index(value)  # type: ignore[arg-type]
    except TypeError as error:
        pass_on(error)
        return False
    return not isinstance(value, bool)


def check_list_of_blocks(name: str, values: object) -> None:
    """As :func:`check_blocks`, but a tuple is refused."""
    if values is None or isinstance(values, tuple):
        hint = hints.for_wanted(values, (list,))
        raise _not_supported(name, values, "list or NumPy array of integers", hint)
    check_blocks(name, values)


def check_list_of_int(name: str, values: object, use: str = "") -> None:
    """Raise ``TypeError`` unless ``values`` is a list (no tuple) of int."""
    check_isinstance(name, values, list, allow_none=False, use=use)
    _check_elements(name, values, int, use)


def _all_are(values: list[Any] | tuple[Any, ...], element: type) -> bool:
    """Whether all values have exactly that type. If not, check each one."""
    return set(map(type, values)) <= {element}


def _check_elements(name: str, values: object, element: type, use: str = "") -> None:
    assert isinstance(values, (list, tuple))
    if _all_are(values, element):
        return  # the common case, many times faster
    for index, value in enumerate(values):
        check_isinstance(f"{name}[{index}]", value, element, allow_none=False, use=use)


def check_dict(name: str, values: object, key: type, value: type) -> None:
    """Raise for anything but a dict of ``key`` to ``value``: ``AttributeError`` for None."""
    if values is None:
        raise AttributeError(
            f"{name} is None, only support dict: give one of {key.__name__} to {value.__name__}"
        )
    check_isinstance(name, values, dict, allow_none=False)
    assert isinstance(values, dict)
    for each, item in values.items():
        check_isinstance(f"a key of {name}", each, key, allow_none=False)
        check_isinstance(f"{name}[{each!r}]", item, value, allow_none=False)


def check_range(name: str, value: object, low: int, high: int) -> None:
    """Raise ``TypeError`` for what is no int, ``ValueError`` outside of ``[low, high]``."""
    if type(value) is not int:  # saves a call, of which a transfer makes ten
        check_isinstance(name, value, int, allow_none=False)
        assert isinstance(value, int)
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, it must be in [{low}, {high}]")


def check_uint16(name: str, value: object) -> None:
    """An unsigned 16-bit integer."""
    check_range(name, value, 0, 2**16 - 1)


def check_uint32(name: str, value: object) -> None:
    """An unsigned 32-bit integer."""
    check_range(name, value, 0, 2**32 - 1)


def check_uint64(name: str, value: object) -> None:
    """An unsigned 64-bit integer."""
    check_range(name, value, 0, 2**64 - 1)


def check_int32(name: str, value: object) -> None:
    """A signed 32-bit integer."""
    check_range(name, value, -(2**31), 2**31 - 1)


def check_int64(name: str, value: object) -> None:
    """A signed 64-bit integer."""
    check_range(name, value, -(2**63), 2**63 - 1)

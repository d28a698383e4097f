"""How a test names a function of its module, and how a worker finds it there.

pytest imports test modules under names that other processes may not be able to import. So the file goes
along with the name.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Reference:
    """A function at module level."""

    module: str
    file: str | None
    """Of the module; None where it is built in."""
    name: str


def reference_to(function: Callable[..., Any]) -> Reference:
    """The reference to a function. Raises ``TypeError`` for what a worker could not find by a name."""
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    name = getattr(function, "__qualname__", "")
    if module is None or _found(module, name) is not function:
        raise TypeError(
            f"{function!r} cannot run in a worker: give a function that is defined at the top level of "
            "a module, such as the test's, and pass it what it needs as arguments"
        )
    file = getattr(module, "__file__", None)
    return Reference(module.__name__, None if file is None else os.path.abspath(file), name)


def resolve(reference: Reference) -> Callable[..., Any]:
    """The function in this process; its module is imported at the first time."""
    found: Callable[..., Any] = _found(_module(reference), reference.name)
    return found


def _found(module: ModuleType, name: str) -> Any:
    try:
        return reduce(getattr, name.split("."), module)
    except AttributeError:
        return None


def _module(reference: Reference) -> ModuleType:
    module = sys.modules.get(reference.module)
    if module is not None and _is_same(getattr(module, "__file__", None), reference.file):
        return module
    if reference.file is None or _is_same(_origin(reference.module), reference.file):
        return importlib.import_module(reference.module)
    return _load(reference.module, reference.file)


def _origin(name: str) -> str | None:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return None if spec is None else spec.origin


def _is_same(file: str | None, wanted: str | None) -> bool:
    if file is None or wanted is None:
        return file is wanted
    return os.path.realpath(file) == os.path.realpath(wanted)


def _load(name: str, file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module

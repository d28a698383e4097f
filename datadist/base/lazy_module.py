"""Modules that are imported at the first use of an attribute, so that `import datadist` stays fast.

Annotations use them, as in ``arrays.CacheTensor``. So type checkers, and readers of type hints at
run time, find the class.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

__all__ = ["LazyModule"]


class LazyModule(ModuleType):
    """A proxy for the module of its name: attribute access imports the module."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # tools inspect every module; that must not import it
            raise AttributeError(f"no {name} before {self.__name__} is imported")
        return getattr(import_module(self.__name__), name)

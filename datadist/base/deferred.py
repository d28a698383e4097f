"""Modules that are imported when something of them is used: `import datadist` is to be quick.

Annotations name what they hold, ``arrays.CacheTensor``, so that readers of type hints find it at run
time, and type checkers as well.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

__all__ = ["Deferred"]


class Deferred(ModuleType):
    """Stands for the module of its name; each attribute is that module's."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by tools that look at every module
            raise AttributeError(f"no {name} before {self.__name__} is imported")
        return getattr(import_module(self.__name__), name)

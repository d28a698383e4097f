"""Finding the vendor libraries and the functions in them, one by one.

Which library holds a function differs between releases of CANN, so every function is looked for in
all candidates. Nothing is loaded before :func:`load` is called.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from datadist.transport import TransportError
from datadist_hccl import abi

OVERRIDE = "DATADIST_HCCL_LIBRARIES"
"""Environment: library files, separated by colons, to use instead of the usual names."""

ACL_LIBRARIES = ("libascendcl.so", "libacl_rt.so")
HCCL_LIBRARIES = ("libhcomm.so", "libhccl.so")


class LibrariesMissing(TransportError):
    """Libraries or functions that the transport needs are not there; the text names them all."""


@dataclass(frozen=True)
class Vendor:
    """The bound functions by name, and the library that each came from."""

    functions: Mapping[str, Callable[..., Any]]
    origins: Mapping[str, str]

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self.functions[name]

    @property
    def libraries(self) -> list[str]:
        """The libraries in use, each once."""
        return list(dict.fromkeys(self.origins.values()))


@dataclass
class _Search:
    """Opened libraries, the loader's errors for the others, and functions that were not found."""

    opened: list[tuple[str, ctypes.CDLL]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def open(self, name: str) -> None:
        try:
            # Other libraries of CANN expect to find these functions, hence RTLD_GLOBAL.
            self.opened.append((name, ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)))
        except OSError as error:
            self.refused.append(str(error))


_lock = threading.Lock()
_loaded: dict[tuple[str, ...], Vendor] = {}


def candidates(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Libraries to look in, in order: those of the override, else ACL's and then HCCL's."""
    override = tuple(name for name in environ.get(OVERRIDE, "").split(":") if name)
    return override or (*ACL_LIBRARIES, *HCCL_LIBRARIES)


def load() -> Vendor:
    """Bind every function, once per process. Raises :class:`LibrariesMissing`."""
    names = candidates(os.environ)
    with _lock:
        if names not in _loaded:
            _loaded[names] = _load(names)
        return _loaded[names]


def _load(names: tuple[str, ...]) -> Vendor:
    search = _Search()
    for name in names:
        search.open(name)
    functions: dict[str, Callable[..., Any]] = {}
    origins: dict[str, str] = {}
    for symbol, signature in (abi.ACL | abi.HCCL).items():
        found = _bind(search, symbol, signature)
        if found is not None:
            origins[symbol], functions[symbol] = found
    if search.missing:
        raise LibrariesMissing(_explain(search))
    return Vendor(functions, origins)


def _bind(
    search: _Search, symbol: str, signature: abi.Signature
) -> tuple[str, Callable[..., Any]] | None:
    for name, library in search.opened:
        try:
            function = getattr(library, symbol)
        except AttributeError:
            continue
        function.restype, function.argtypes = signature
        return name, function
    search.missing.append(symbol)
    return None


def _explain(search: _Search) -> str:
    if not search.opened:
        return (
            "the libraries of CANN cannot be loaded: " + "; ".join(search.refused) + " (source "
            f"set_env.sh of the toolkit, or name the files in {OVERRIDE})"
        )
    text = (
        f"{', '.join(name for name, _ in search.opened)} do not have {', '.join(search.missing)}"
        ": a release of CANN from 8.5.0 on is needed"
    )
    return text + (f"; not loaded: {'; '.join(search.refused)}" if search.refused else "")

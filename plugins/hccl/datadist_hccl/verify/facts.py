"""The machine's part of a report: releases, and the path of every library."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from datadist.base.version import own_version
from datadist.transport import TransportError
from datadist_hccl import abi
from datadist_hccl.libraries import Vendor, load
from datadist_hccl.transport import DRIVER_VERSION

MAPS = Path("/proc/self/maps")


def facts() -> Iterator[str]:
    """Lines of the report; the libraries are loaded for that, no device is opened."""
    yield (
        f"datadist-hccl {version('datadist-hccl')}, datadist {own_version()}, Python "
        f"{platform.python_version()}, {platform.platform()}"
    )
    yield f"- driver: {driver(DRIVER_VERSION)}"
    try:
        vendor = load()
    except TransportError as error:
        yield f"- libraries: {error}"
    else:
        yield from _libraries(vendor)
    known = {k: v for k, v in sorted(os.environ.items()) if k.startswith(("HCCL_", "ASCEND_"))}
    yield f"- environment: {known}"


def driver(file: Path) -> str:
    """The release that the driver's installation names."""
    try:
        found = re.search(r"^Version\s*=\s*(\S+)", file.read_text(), re.MULTILINE)
    except OSError as error:
        return f"unknown ({error})"
    return found[1] if found else f"unknown ({file} names none)"


def _libraries(vendor: Vendor) -> Iterator[str]:
    """The release of CANN is part of the paths, as it is installed."""
    for library in vendor.libraries:
        names = [name for name, origin in vendor.origins.items() if origin == library]
        yield (
            f"- {library}: {len(names)} of {len(abi.ACL | abi.HCCL)} functions, "
            f"loaded from {_loaded_from(library)}"
        )
    yield f"- HcclGetCommConfigCapability: {_capability(vendor)}"


def _loaded_from(library: str) -> str:
    name = Path(library).name
    mapped = {line.split(maxsplit=5)[5] for line in MAPS.read_text().splitlines() if "/" in line}
    paths = sorted(path for path in mapped if Path(path).name.startswith(name))
    real = os.path.realpath(library) if os.path.sep in library else None
    return ", ".join(paths) or real or "a path that is not known"


def _capability(vendor: Vendor) -> str:
    """What communicators of this release can be configured with; nothing depends on it."""
    library = ctypes.CDLL(vendor.origins["HcclCommInitClusterInfoMemConfig"])
    try:
        function = library.HcclGetCommConfigCapability
    except AttributeError:
        return "not in this release"
    function.restype, function.argtypes = ctypes.c_uint32, ()
    return f"{function()} (more than 2 is needed, for names)"

"""Ascend NPUs: device nodes and the vendor's libraries; nothing is loaded."""

from __future__ import annotations

import ctypes.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from datadist.diagnosis.finding import Finding, Level, on

DEV = Path("/dev")
LIBRARIES = ("libascendcl.so", "libhccl.so")
HCCL = on("hccl")


def examine(dev: Path = DEV, environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Device nodes, toolkit, libraries."""
    nodes = sorted(p.name for p in dev.glob("davinci[0-9]*"))
    if not nodes:
        yield Finding(
            "Ascend devices", Level.PROBLEM, "no /dev/davinci*",
            "install the NPU driver; in a container pass /dev/davinci*, /dev/davinci_manager, "
            "/dev/devmm_svm and /dev/hisi_hdc", HCCL,
        )  # fmt: skip
    else:
        yield Finding("Ascend devices", Level.OK, ", ".join(nodes), "", HCCL)
    for name in LIBRARIES:
        path = find(name, environ)
        if path is None:
            yield Finding(
                name, Level.PROBLEM, "not found",
                "install the CANN toolkit and source its set_env.sh before the program starts", HCCL,
            )  # fmt: skip
        else:
            yield Finding(name, Level.OK, path, "", HCCL)


def find(name: str, environ: Mapping[str, str]) -> str | None:
    """The path at which the loader would find a library, without loading it; None if it would not."""
    places = [Path(p) for p in environ.get("LD_LIBRARY_PATH", "").split(":") if p]
    for place in places:
        if (place / name).exists():
            return str(place / name)
    return ctypes.util.find_library(name.removeprefix("lib").removesuffix(".so"))

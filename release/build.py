"""`make wheels`: sdists and wheels of all distributions, in dist/; wheels are built from the sdists."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from release.commands import CommandFailed, tool
from release.distributions import DISTRIBUTIONS, ROOT
from release.extension import build_extension, prepare
from release.sources import export, time_of_commit
from release.targets import MACHINES, REQUIRED, Target, ask, choose

PLACE = ROOT / "build" / "release"
CACHE = PLACE / "zig"


def main() -> int:
    """0 when everything that the given interpreters permit was built."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pythons", type=Path, nargs="+", help="interpreters, for their headers")
    parser.add_argument("--machine", choices=MACHINES, action="append", help="default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    given = parser.parse_args()
    targets = choose(map(ask, given.pythons), given.machine or MACHINES)
    CACHE.mkdir(parents=True, exist_ok=True)
    os.environ["SOURCE_DATE_EPOCH"] = time_of_commit(ROOT)
    try:
        with tempfile.TemporaryDirectory(dir=PLACE) as scratch:
            _build(targets, Path(scratch))
            shutil.rmtree(given.out, ignore_errors=True)
            (Path(scratch) / "dist").rename(given.out)
    except CommandFailed as error:
        print(error, file=sys.stderr)
        return 1
    for path in sorted(given.out.iterdir()):
        print(f"{path.stat().st_size / 1024:8.0f} KiB  {path.name}")
    for lacking in _lacking(targets):
        print(f"not built: {lacking}")
    return 0


def _build(targets: Sequence[Target], scratch: Path) -> None:
    source, out = scratch / "source", scratch / "dist"
    export(ROOT, source)
    for each in DISTRIBUTIONS:
        print(f"sdist of {each.name}", flush=True)
        tool("build", "--no-isolation", "--sdist", "--outdir", out, source / each.folder)
    sdists = {each: next(out.glob(f"{each.stem}-*.tar.gz")) for each in DISTRIBUTIONS}
    pure = [path for each, path in sdists.items() if not each.native]
    print(f"{len(pure)} wheels of Python alone", flush=True)
    tool(
        "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--no-cache-dir",
        "--wheel-dir", out, *pure,
    )  # fmt: skip
    (native,) = (path for each, path in sdists.items() if each.native)
    _build_extensions(native, targets, scratch, out)


def _build_extensions(sdist: Path, targets: Sequence[Target], scratch: Path, out: Path) -> None:
    interpreters = {target.interpreter for target in targets}
    pythons = {each: prepare(each, scratch) for each in interpreters}

    def build(target: Target) -> Path:
        return build_extension(sdist, target, pythons[target.interpreter], out, CACHE)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for wheel in threads.map(build, targets):
            print(wheel.name, flush=True)


def _lacking(targets: Sequence[Target]) -> list[str]:
    """Kinds of Python that no given interpreter is of."""
    kinds = {(target.python, target.abi) for target in targets}
    found = [
        f"{python}-{abi}: no such Python was given" for python, abi in REQUIRED
        if (python, abi) not in kinds
    ]  # fmt: skip
    if not any(abi.endswith("t") for _, abi in kinds):
        found.append("free-threaded wheels: no such Python was given")
    return found


if __name__ == "__main__":
    sys.exit(main())

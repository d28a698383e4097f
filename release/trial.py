"""`make try-wheels`: the wheels work where there is no compiler, away from the checkout.

Each interpreter gets a new environment, where PATH has the environment's own programs only.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path

from release.commands import CommandFailed, run
from release.distributions import DISTRIBUTIONS, ROOT

COMMANDS = (("backends",), ("demo",), ("conformance", "shm"))


def main() -> int:
    """0 when all of it worked with each interpreter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pythons", type=Path, nargs="+")
    parser.add_argument("--wheels", type=Path, default=ROOT / "dist")
    parser.add_argument("--keep", type=Path, help="folder for the environment of a single Python")
    given = parser.parse_args()
    if given.keep is not None and len(given.pythons) > 1:
        parser.error(f"--keep is for one Python, and {len(given.pythons)} were given")
    wheels = given.wheels.absolute()
    try:
        for python in given.pythons:
            if given.keep is not None:
                _try(python, wheels, given.keep.absolute())
                continue
            with tempfile.TemporaryDirectory() as place:
                _try(python, wheels, Path(place))
    except CommandFailed as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _try(python: Path, wheels: Path, place: Path) -> None:
    venv = place / "venv"
    run(python, "-m", "venv", venv)
    environ = without_compiler(venv)
    pip = (venv / "bin" / "python", "-m", "pip", "--disable-pip-version-check")
    # First ours alone and from there alone, then what they need, which must have wheels too.
    names = [each.name for each in DISTRIBUTIONS if each.uploaded]
    run(
        *pip, "install", "--no-index", "--no-deps", "--find-links", wheels, *names,
        cwd=place, environ=environ,
    )  # fmt: skip
    run(
        *pip, "install", "--only-binary", ":all:", "datadist[testing]", "datadist-shm",
        "pytest-datadist", cwd=place, environ=environ,
    )  # fmt: skip
    run(*pip, "check", cwd=place, environ=environ)
    print(run(venv / "bin" / "python", "--version", environ=environ).strip(), flush=True)
    for command in COMMANDS:
        begun = time.monotonic()
        said = run(venv / "bin" / "datadist", *command, cwd=place, environ=environ)
        spent = time.monotonic() - begun
        print(f"  {spent:5.1f} s  datadist {' '.join(command)}: {_last(said)}", flush=True)


def without_compiler(venv: Path) -> Mapping[str, str]:
    """An environment that finds the programs of ``venv``, and no compiler."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, "PATH": str(venv / "bin"), "CC": "/bin/false", "CXX": "/bin/false"}


def _last(text: str) -> str:
    return textwrap.shorten(text.rstrip().rsplit("\n", 1)[-1], 100)


if __name__ == "__main__":
    sys.exit(main())

"""Wheels with the native extension: compiled by Zig, whose targets name the C library's version."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from packaging.utils import parse_wheel_filename

from release.commands import CommandFailed, run, tool
from release.targets import GLIBC, Interpreter, Target

__all__ = ["build_extension", "prepare"]

BACKEND = Path(__file__).parent / "backend.txt"
CFLAGS = "-DNDEBUG -fwrapv -Werror"
LIMITED = "-DPy_LIMITED_API=0x030B0000"


def prepare(interpreter: Interpreter, place: Path) -> Path:
    """An environment of this Python that has the build backend; returns its interpreter."""
    venv = place / "cp{}{}{}".format(*interpreter.version, "t" * interpreter.free_threaded)
    run(interpreter.path, "-m", "venv", venv)
    run(venv / "bin" / "python", "-m", "pip", "install", "--quiet", "-r", BACKEND)
    return venv / "bin" / "python"


def build_extension(sdist: Path, target: Target, python: Path, out: Path, cache: Path) -> Path:
    """Compile the sdist for ``target`` with a prepared ``python``; ``cache`` may be used again.

    Raises :class:`CommandFailed`, also where the wheel does not deserve its tag.
    """
    abi3 = target.abi == "abi3"
    options = [f"--config-settings=--build-option=--py-limited-api={target.python}"] if abi3 else []
    with tempfile.TemporaryDirectory(dir=cache) as raw:
        run(
            python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index",
            "--no-build-isolation", "--no-cache-dir", *options, "--wheel-dir", raw, sdist,
            environ=_environ(target, cache),
        )  # fmt: skip
        (wheel,) = Path(raw).glob("*.whl")
        said = tool("auditwheel", "repair", "--plat", "auto", "--wheel-dir", out, wheel)
    repaired = next((path for path in out.glob("*.whl") if _is_for(path, target)), None)
    if repaired is None:
        raise CommandFailed(f"auditwheel made no wheel for {target.name} of {wheel.name}:\n{said}")
    _check_contents(repaired)
    if abi3:
        tool("abi3audit", "--strict", repaired)
    return repaired


def _environ(target: Target, cache: Path) -> Mapping[str, str]:
    """What tells setuptools to compile for ``target`` instead of for this machine.

    A target that is named gets the instructions that every such processor has. Of Clang's run-time
    library nothing is taken: its memcpy would replace the C library's.
    """
    compiler = f"{_zig()} cc -target {target.machine}-linux-gnu.{GLIBC} -rtlib=none"
    flags = {"CFLAGS": CFLAGS, "SETUPTOOLS_EXT_SUFFIX": _suffix(target)}
    if target.abi == "abi3":
        flags |= {"CFLAGS": f"{CFLAGS} {LIMITED}"}
    return {
        **os.environ, **flags, "CC": compiler, "LDSHARED": f"{compiler} -shared -s", "LDFLAGS": "",
        "_PYTHON_HOST_PLATFORM": f"linux-{target.machine}",
        "ZIG_GLOBAL_CACHE_DIR": str(cache), "ZIG_LOCAL_CACHE_DIR": str(cache),
    }  # fmt: skip


def _zig() -> Path:
    found = find_spec("ziglang")
    if found is None or found.origin is None:
        raise CommandFailed("Zig is not installed here: run make wheels, which installs it")
    return Path(found.origin).parent / "zig"


def _suffix(target: Target) -> str:
    if target.abi == "abi3":
        return ".abi3.so"
    return f".cpython-{target.abi.removeprefix('cp')}-{target.machine}-linux-gnu.so"


def _is_for(wheel: Path, target: Target) -> bool:
    tags = parse_wheel_filename(wheel.name)[3]
    return any(
        (tag.interpreter, tag.abi, tag.platform) == (target.python, target.abi, target.platform)
        for tag in tags
    )


def _check_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if ".so" in name]
    if len(libraries) != 1:
        raise CommandFailed(f"{wheel.name} has {libraries}: expected our extension and no library")

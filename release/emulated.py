"""`make try-wheels-emulated`: wheels on processors that this machine is not, under QEMU's user mode.

On aarch64 Debian's Python, which is fetched and unpacked, never installed, moves a cache between two
processes. On x86-64 without AVX this machine's Python copies with each kernel that is left.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from release.commands import CommandFailed, run, tool
from release.distributions import ROOT

PLACE = ROOT / "build" / "release"
ARCHIVE = "deb [signed-by={}] http://deb.debian.org/debian {} main\n"
KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"
PACKAGES = ("python3", "libstdc++6")  # NumPy's wheels need the latter
OLD_PROCESSOR = "Nehalem"
"""The oldest that NumPy runs on."""
COPIES = Path(__file__).parent / "copies.py"


def main() -> int:
    """0 when the wheels of both machines worked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheels", type=Path, default=ROOT / "dist")
    wheels = parser.parse_args().wheels.absolute()
    PLACE.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=PLACE) as place:
            _try_old_processor(wheels, Path(place))
            _try_aarch64(wheels, Path(place))
    except CommandFailed as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _try_old_processor(wheels: Path, place: Path) -> None:
    site = place / "x86_64"
    tool(
        "pip", "install", "--quiet", "--only-binary", ":all:", "--target", site,
        *_own(wheels, platform.machine()),
    )  # fmt: skip
    emulator = _emulator("qemu-x86_64-static")
    environ = {**os.environ, "PYTHONPATH": str(site)}
    said = run(emulator, "-cpu", OLD_PROCESSOR, sys.executable, COPIES, environ=environ)
    print(f"x86-64, {OLD_PROCESSOR}: {said}", end="", flush=True)
    if "avx" in said:
        raise CommandFailed(f"kernels with AVX are offered on {OLD_PROCESSOR}, which has none")


def _try_aarch64(wheels: Path, place: Path) -> None:
    python, root = place / "python", place / "root"
    emulator = f"{_emulator('qemu-aarch64-static')} -L {root} {root}/usr/bin/python3"
    python.write_text(f'#!/bin/sh\nexec {emulator} "$@"\n')
    python.chmod(0o755)
    _unpack_python(place)
    site = place / "aarch64"
    version = run(python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
    tool(
        "pip", "install", "--quiet", "--only-binary", ":all:", "--target", site,
        "--implementation", "cp", "--python-version", version,
        "--platform", "manylinux_2_28_aarch64", "--platform", "manylinux_2_17_aarch64",
        *_own(wheels, "aarch64"),
    )  # fmt: skip
    # Processes that the demo starts are emulated too.
    (site / "sitecustomize.py").write_text(f"import sys\nsys.executable = {str(python)!r}\n")
    environ: Mapping[str, str] = {
        **os.environ, "PYTHONPATH": str(site), "DATADIST_RUNTIME_DIR": str(place / "run"),
    }  # fmt: skip
    print(f"aarch64, Python {version}: {run(python, COPIES, environ=environ)}", end="", flush=True)
    print(run(python, "-m", "datadist", "backends", cwd=place, environ=environ))
    print(run(python, "-m", "datadist", "demo", "--tokens", "256", cwd=place, environ=environ))


def _own(wheels: Path, machine: str) -> Iterator[Path]:
    """Our wheels that this machine needs for the demo."""
    for pattern in ("datadist-*.whl", f"datadist_shm-*-abi3-*{machine}.whl"):
        found = list(wheels.glob(pattern))
        if len(found) != 1:
            raise CommandFailed(f"{wheels} has {len(found)} files {pattern}: run make wheels")
        yield found[0]


def _emulator(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise CommandFailed(f"needs {name}: apt-get install qemu-user-static")
    return found


def _unpack_python(place: Path) -> None:
    """Debian's Python for aarch64, by an apt of its own that knows no other machine."""
    state, archives = place / "apt", place / "archives"
    for folder in (state / "lists" / "partial", state / "cache" / "archives" / "partial", archives):
        folder.mkdir(parents=True)
    (state / "status").touch()
    (state / "sources.list").write_text(ARCHIVE.format(KEYS, _release()))
    (state / "conf").write_text(
        'APT::Architecture "arm64";\nAPT::Architectures {"arm64";};\nAPT::Sandbox::User "root";\n'
        f'Dir::State "{state}";\nDir::State::status "{state}/status";\nDir::Cache "{state}/cache";\n'
        f'Dir::Etc::sourcelist "{state}/sources.list";\nDir::Etc::sourceparts "/dev/null";\n'
    )
    environ = {**os.environ, "APT_CONFIG": str(state / "conf")}
    run("apt-get", "-qq", "update", environ=environ)
    plan = run("apt-get", "install", "-s", "--no-install-recommends", *PACKAGES, environ=environ)
    needed = re.findall(r"^Inst (\S+)", plan, re.MULTILINE)
    run("apt-get", "-qq", "download", *needed, cwd=archives, environ=environ)
    for archive in sorted(archives.iterdir()):
        run("dpkg", "-x", archive, place / "root")


def _release() -> str:
    name = platform.freedesktop_os_release().get("VERSION_CODENAME")
    if name is None or not Path("/etc/debian_version").exists():
        raise CommandFailed("Python for aarch64 is fetched from Debian's archive: needs Debian")
    return name


if __name__ == "__main__":
    sys.exit(main())

"""A kernel with soft-RoCE: fetched as a package and unpacked, never installed."""

from __future__ import annotations

import lzma
import os
import platform
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

META_PACKAGE = "linux-image-amd64"
MODULES = (
    "virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_net", "dummy",
    "crc32_generic", "crc32_pclmul", "rdma_rxe",
)  # fmt: skip
"""crc32_generic: soft-RoCE asks for it at run time, no dependency names it."""
PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "modprobe": "kmod",
    "depmod": "kmod",
    "dpkg": "dpkg",
    "apt-get": "apt",
    "rdma": "iproute2",
    "ip": "iproute2",
    "ib_read_bw": "perftest",
}
"""What the harness runs, on the host or from it in the guest, and the Debian packages of it."""


class Unavailable(Exception):
    """The virtual machines cannot run here; the text says what is missing."""


@dataclass(frozen=True)
class Kernel:
    """A kernel image, and the modules that the guest loads, in order."""

    version: str
    image: Path
    modules: tuple[Path, ...]


def check_programs() -> None:
    """Raise :class:`Unavailable` naming the packages that are missing."""
    if platform.machine() != "x86_64":
        raise Unavailable(f"the virtual machines are x86-64, this is {platform.machine()}")
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = {pkg for name, pkg in PROGRAMS.items() if shutil.which(name, path=path) is None}
    if not any(
        Path(d).glob("libibverbs.so.1*") for d in ("/usr/lib/x86_64-linux-gnu", "/usr/lib64")
    ):
        missing.add("libibverbs1")
    if not Path("/etc/libibverbs.d/rxe.driver").exists():
        missing.add("ibverbs-providers")
    if missing:
        raise Unavailable(
            f"these packages are missing: {' '.join(sorted(missing))} (apt-get install "
            "--no-install-recommends)"
        )


def fetch(cache: Path) -> Kernel:
    """The newest packaged kernel, from ``cache`` or the package archive.

    Raises :class:`Unavailable`.
    """
    check_programs()
    package = _package_name()
    place = cache / package
    if not (place / "order").exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            _unpack(package, Path(scratch))
            _keep(Path(scratch), Path(scratch) / "kept")
            shutil.rmtree(place, ignore_errors=True)
            os.rename(Path(scratch) / "kept", place)
    names = (place / "order").read_text().split()
    return Kernel(package, place / "vmlinuz", tuple(place / name for name in names))


def _package_name() -> str:
    listed = _run("apt-cache", "depends", META_PACKAGE)
    found = re.search(r"Depends: (linux-image-[0-9]\S*)", listed)
    if found is None:
        raise Unavailable(f"the package archive has no {META_PACKAGE}: run apt-get update")
    shown = _run("apt-cache", "show", "--no-all-versions", found[1])
    version = re.search(r"^Version: (\S+)", shown, re.MULTILINE)
    return f"{found[1]}_{version[1].replace(':', '.') if version else 'unknown'}"


def _unpack(package: str, scratch: Path) -> None:
    try:
        _run("apt-get", "download", package.split("_", maxsplit=1)[0], cwd=scratch)
    except Unavailable as error:
        raise Unavailable(f"the kernel package cannot be fetched: {error}") from None
    (archive,) = scratch.glob("*.deb")
    _run("dpkg", "-x", str(archive), str(scratch / "root"))


def _keep(scratch: Path, kept: Path) -> None:
    """Copy the image and the modules that we load, with their order; the rest is 400 MB."""
    root = scratch / "root"
    (version,) = (path.name for path in (root / "lib/modules").iterdir())
    _run("depmod", "-b", str(root), version)
    kept.mkdir()
    shutil.copy(root / f"boot/vmlinuz-{version}", kept / "vmlinuz")
    order: dict[str, Path] = {}
    for module in MODULES:
        shown = _run("modprobe", "-d", str(root), "-S", version, "--show-depends", module)
        for line in re.findall(r"^insmod (\S+)", shown, re.MULTILINE):
            order.setdefault(Path(line).name, Path(line))
    names = [_keep_module(path, kept) for path in order.values()]
    (kept / "order").write_text("\n".join(names))


def _keep_module(path: Path, kept: Path) -> str:
    """Copy a module, unpacked, which the guest's insmod needs; its name."""
    if path.suffix not in (".ko", ".xz"):
        raise Unavailable(f"{path.name} is compressed in a way that is not understood here")
    data = path.read_bytes()
    name = path.name.removesuffix(".xz")
    (kept / name).write_bytes(lzma.decompress(data) if name != path.name else data)
    return name


def _run(*command: str, cwd: Path | None = None) -> str:
    environ = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=300, check=True
        )
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{' '.join(command)} failed: {error.stderr.strip()[-500:]}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{' '.join(command)} failed: {error}") from None
    return done.stdout

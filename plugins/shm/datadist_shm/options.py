"""Options of the shm transport: text in, checked values out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from datadist.transport import TransportError
from datadist_shm import _native

KERNEL_VARIABLE = "DATADIST_SHM_KERNEL"
MOST_THREADS = 4
"""Threads per transfer unless more are asked for: a few saturate the memory of most machines."""

KNOWN = {
    "populate": "have all pages of pools present before a link is OK (default 1)",
    "ptracer": "let peers reach registered memory where kernel.yama.ptrace_scope is 1 (default 1)",
    "threads": "threads that one large transfer uses, at most (default: the CPUs, up to 4)",
    "huge_pages": "huge pages for pools: auto (where offered, default), 1 (or fail), 0 (never)",
    "kernel": "how large transfers copy: auto (default), or one of " + ", ".join(_native.KERNELS),
}


@dataclass(frozen=True)
class Options:
    """What the user chose, or the defaults."""

    populate: bool
    ptracer: bool
    threads: int
    huge_pages: str
    kernel: int

    @property
    def kernel_name(self) -> str:
        """The kernel's name."""
        return next(name for name, number in _native.KERNELS.items() if number == self.kernel)

    @classmethod
    def parse(cls, given: Mapping[str, str], environ: Mapping[str, str]) -> Options:
        """Check ``datadist.shm.<name>`` options. Raises :class:`TransportError`."""
        unknown = sorted(set(given) - set(KNOWN))
        if unknown:
            known = ", ".join(f"{name}: {text}" for name, text in KNOWN.items())
            raise TransportError(f"unknown option datadist.shm.{unknown[0]}; there are {known}")
        return cls(
            populate=_choice(given, "populate", "1", ("0", "1")) == "1",
            ptracer=_choice(given, "ptracer", "1", ("0", "1")) == "1",
            threads=_threads(given.get("threads")),
            huge_pages=_choice(given, "huge_pages", "auto", ("auto", "0", "1")),
            kernel=_kernel(given, environ),
        )


def _choice(given: Mapping[str, str], name: str, default: str, values: tuple[str, ...]) -> str:
    value = given.get(name, default)
    if value not in values:
        wanted = " or ".join(f'"{v}"' for v in values)
        raise TransportError(f"option datadist.shm.{name} is {value!r}, it must be {wanted}")
    return value


def _threads(text: str | None) -> int:
    """Never more than the CPUs that this process may use."""
    cpus = min(len(os.sched_getaffinity(0)), _native.MAX_THREADS)
    if text is None:
        return min(cpus, MOST_THREADS)
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text) <= _native.MAX_THREADS:
        raise TransportError(
            f"option datadist.shm.threads is {text!r}, it must be a number from 1 to "
            f"{_native.MAX_THREADS}"
        )
    return min(int(text), cpus)


def _kernel(given: Mapping[str, str], environ: Mapping[str, str]) -> int:
    name = given.get("kernel", environ.get(KERNEL_VARIABLE, "auto"))
    if name == "auto":
        return list(_native.KERNELS.values())[-1]
    if name not in _native.KERNELS:
        raise TransportError(
            f"the copy kernel {name!r} (datadist.shm.kernel, {KERNEL_VARIABLE}) does not exist on "
            f"this machine: use auto or one of {', '.join(_native.KERNELS)}"
        )
    return _native.KERNELS[name]

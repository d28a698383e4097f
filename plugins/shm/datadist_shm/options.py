"""Options of the shm transport: text in, checked values out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from datadist.base import cgroups
from datadist.base.texts import short_repr
from datadist.plugin_options import choice, number, refuse_unknown
from datadist.transport import OptionError
from datadist_shm import _native

DEFAULT_MAX_THREADS = 4
"""Threads that make pages unless more are asked for: a few saturate the memory of most machines."""

KNOWN = {
    "populate": "make all pages of pools, and map those of peers, in the background (default 1)",
    "overcommit": "warn of a pool that memory does not suffice for, instead of refusing it (default 0)",
    "ptracer": "let peers reach registered memory where kernel.yama.ptrace_scope is 1 (default 1)",
    "threads": "threads that one large transfer uses, at most (default: measured, at most the CPUs)",
    "huge_pages": "huge pages: auto (where the kernel has them, default), 1 (or fail), 0 (never)",
    "kernel": "how large transfers copy: auto (measured, default), or "
    + ", ".join(_native.KERNELS),
}


@dataclass(frozen=True)
class Options:
    """What the user chose, or the defaults."""

    populate: bool
    overcommit: bool
    ptracer: bool
    threads: int
    """Threads that make pages."""
    copy_threads: int
    """Threads of a transfer; negative: as many as are measured to be useful, at most so many."""
    huge_pages: str
    kernel: str

    @property
    def kernel_number(self) -> int:
        """The kernel as native code knows it."""
        return _native.KERNELS.get(self.kernel, _native.AUTO)

    @classmethod
    def parse(cls, given: Mapping[str, str]) -> Options:
        """Check ``datadist.shm.<name>`` options. Raises :class:`OptionError`."""
        refuse_unknown("shm", given, KNOWN)
        threads = _threads(given.get("threads"))
        return cls(
            populate=_choice(given, "populate", "1", ("0", "1")) == "1",
            overcommit=_choice(given, "overcommit", "0", ("0", "1")) == "1",
            ptracer=_choice(given, "ptracer", "1", ("0", "1")) == "1",
            threads=threads or min(copy_threads(), DEFAULT_MAX_THREADS),
            copy_threads=threads or -copy_threads(),
            huge_pages=_choice(given, "huge_pages", "auto", ("auto", "0", "1")),
            kernel=_kernel(given),
        )


def _choice(given: Mapping[str, str], name: str, default: str, values: tuple[str, ...]) -> str:
    return choice(f"option datadist.shm.{name}", given.get(name, default), values)


def copy_threads() -> int:
    """Most threads of a transfer: the CPUs that this process may use."""
    return min(cgroups.cpus(), _native.MAX_THREADS)


def _threads(text: str | None) -> int | None:
    """What was asked for, but never more than the CPUs; None where nothing was."""
    if text is None:
        return None
    return min(number("option datadist.shm.threads", text, 1, _native.MAX_THREADS), copy_threads())


def _kernel(given: Mapping[str, str]) -> str:
    name = given.get("kernel", "auto")
    if name != "auto" and name not in _native.KERNELS:
        raise OptionError(
            f"option datadist.shm.kernel is {short_repr(name)}, a copy kernel that "
            f"does not exist on this machine: use auto "
            f"or one of {', '.join(_native.KERNELS)}"
        )
    return name

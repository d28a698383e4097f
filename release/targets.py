"""For which kinds of Python and which machines the extension is compiled."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["GLIBC", "MACHINES", "REQUIRED", "Interpreter", "Target", "ask", "choose"]

MACHINES = ("x86_64", "aarch64")
GLIBC = "2.17"
"""The oldest C library that the wheels run on, that of manylinux_2_17."""
OLDEST = (3, 10)
STABLE = (3, 11)
"""The first Python whose limited API has the buffer protocol: one wheel serves it and all later ones."""
REQUIRED = (("cp310", "cp310"), ("cp311", "abi3"))
"""Tags of Python and ABI that a release has for each machine."""
QUESTION = (
    "import sys, sysconfig\n"
    "print(*sys.version_info[:2], sysconfig.get_config_var('Py_GIL_DISABLED') or 0)"
)


@dataclass(frozen=True)
class Interpreter:
    """A Python of this machine, whose headers are compiled against."""

    path: Path
    version: tuple[int, int]
    free_threaded: bool = False


@dataclass(frozen=True)
class Target:
    """One wheel of the extension."""

    interpreter: Interpreter
    python: str
    abi: str
    machine: str

    @property
    def platform(self) -> str:
        """The tag that the wheel must deserve."""
        return f"manylinux_{GLIBC.replace('.', '_')}_{self.machine}"

    @property
    def name(self) -> str:
        """Its tag as people read it."""
        return f"{self.python}-{self.abi}-{self.platform}"


def ask(path: Path) -> Interpreter:
    """What kind of Python this is."""
    answer = subprocess.run([path, "-c", QUESTION], check=True, capture_output=True, text=True)
    major, minor, free_threaded = map(int, answer.stdout.split())
    return Interpreter(path, (major, minor), bool(free_threaded))


def choose(interpreters: Iterable[Interpreter], machines: Iterable[str] = MACHINES) -> list[Target]:
    """The wheels that these interpreters can be used for; one of each kind.

    Headers depend on the machine in nothing that the extension uses: those of this machine serve
    for the other ones.
    """
    chosen: dict[tuple[str, str], Interpreter] = {}
    for interpreter in sorted(interpreters, key=lambda each: each.version):
        if interpreter.version >= OLDEST:
            chosen.setdefault(_tags(interpreter), interpreter)
    return [
        Target(interpreter, python, abi, machine)
        for (python, abi), interpreter in chosen.items()
        for machine in machines
    ]


def _tags(interpreter: Interpreter) -> tuple[str, str]:
    own = "cp{}{}".format(*interpreter.version)
    if interpreter.free_threaded:  # has no limited API
        return own, f"{own}t"
    if interpreter.version >= STABLE:
        return "cp{}{}".format(*STABLE), "abi3"
    return own, own

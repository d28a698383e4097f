"""Running commands, whose output matters only where they fail."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["CommandFailed", "run", "tool"]

SECONDS = 1200.0


class CommandFailed(Exception):
    """A command failed; the text says which, and what it printed."""


def run(
    *command: str | Path, cwd: Path | None = None, environ: Mapping[str, str] | None = None
) -> str:
    """What the command printed. Raises :class:`CommandFailed`."""
    line = " ".join(map(str, command))
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise CommandFailed(f"{line}\nran longer than {SECONDS:.0f} s") from None
    if done.returncode:
        raise CommandFailed(f"{line}\nfailed with status {done.returncode}:\n{done.stdout}")
    return done.stdout


def tool(
    name: str,
    *arguments: str | Path,
    cwd: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> str:
    """Run a module of the environment of release/requirements.txt, its programs found first."""
    given = dict(os.environ if environ is None else environ)
    given["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), given.get("PATH", "")))
    return run(sys.executable, "-m", name, *arguments, cwd=cwd, environ=given)

"""What a release is built from: all files but those that git ignores, which builds leave between them."""

from __future__ import annotations

import shutil
from pathlib import Path

from release.commands import run

__all__ = ["export", "time_of_commit"]


def export(root: Path, place: Path) -> None:
    """Copy the files as they are in the working tree; `make release-check` sees what is not committed."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=root)
    for name in listed.split("\0"):
        if name and (root / name).is_file():
            target = place / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target)


def time_of_commit(root: Path) -> str:
    """Seconds: what all files of the wheels are dated with, so that a second build is the same."""
    return run("git", "log", "-1", "--format=%ct", cwd=root).strip()

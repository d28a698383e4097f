"""`make release-check`: whether dist/ can be uploaded, and by which commands. Uploads nothing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from release.commands import CommandFailed, run, tool
from release.distributions import DISTRIBUTIONS, ROOT
from release.files import Built, read
from release.findings import Release, findings, load_version


def main() -> int:
    """0 when nothing is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheels", type=Path, default=ROOT / "dist")
    wheels = parser.parse_args().wheels
    unreadable: list[str] = []
    built = _read_all(wheels, unreadable)
    release = Release(ROOT, load_version(ROOT), built)
    problems = [
        *unreadable,
        *findings(release),
        *_twine(built),
        *state_of_git(ROOT, release.version),
    ]
    for problem in problems:
        print(problem)
    if problems:
        print(f"\n{len(problems)} found: {release.version} cannot be released like this")
        return 1
    print(f"{len(built)} files of {release.version} are as they should be.\n\n{plan(release)}")
    return 0


def _read_all(wheels: Path, unreadable: list[str]) -> list[Built]:
    built = []
    for path in sorted(wheels.glob("*")):
        try:
            built.append(read(path))
        except (ValueError, OSError) as error:
            unreadable.append(str(error))
    return built


def _twine(built: list[Built]) -> Iterator[str]:
    """What the index would say of the metadata."""
    if built:
        try:
            tool("twine", "check", "--strict", *(each.path for each in built))
        except CommandFailed as error:
            yield str(error)


def state_of_git(root: Path, version: str) -> Iterator[str]:
    """The tree is committed; a tag of this version, where there is one, is on this commit."""
    changed = run("git", "status", "--porcelain", cwd=root).splitlines()
    if changed:
        yield f"{len(changed)} files are not committed, such as {changed[0][3:]}: commit them"
    if (
        _tagged(root, version)
        and run("git", "tag", "--points-at", cwd=root).split().count(f"v{version}") == 0
    ):
        yield f"the tag v{version} is on another commit: raise the version, or check the tag out"


def _tagged(root: Path, version: str) -> bool:
    return bool(run("git", "tag", "--list", f"v{version}", cwd=root).strip())


def plan(release: Release) -> str:
    """The commands of the release, for a person to run."""
    version = release.version
    lines = (
        []
        if _tagged(release.root, version)
        else [f"git tag -s v{version} && git push origin v{version}"]
    )
    lines += [
        "build/release/venv/bin/twine upload "
        + " ".join(sorted(f"dist/{each.path.name}" for each in release.of(distribution)))
        for distribution in DISTRIBUTIONS
        if distribution.uploaded
    ]
    kept = [each.name for each in DISTRIBUTIONS if not each.uploaded]
    return (
        "Run, in this order, since later ones need earlier ones:\n\n"
        + "\n".join(lines)
        + f"\n\nNot to be uploaded, an example: {', '.join(kept)}"
    )


if __name__ == "__main__":
    sys.exit(main())

"""What is wrong with a release: each check yields a sentence for each defect."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from release.distributions import DISTRIBUTIONS, Distribution, version_of
from release.files import Built
from release.targets import GLIBC, MACHINES, REQUIRED

__all__ = ["Release", "findings", "load_version"]

HEADING = re.compile(r"^## (\S+)(.*)\n((?:(?!## ).*\n?)*)", re.MULTILINE)
DATED = re.compile(r" \(\d{4}-\d{2}-\d{2}\)")
GENERATED = re.compile(r"PKG-INFO|setup\.cfg|[^/]+\.egg-info/.*")


@dataclass(frozen=True)
class Release:
    """A working tree and what was built from it."""

    root: Path
    version: str
    built: Sequence[Built]

    def of(self, distribution: Distribution) -> list[Built]:
        """The files of one distribution."""
        return [each for each in self.built if each.metadata.name == distribution.name]


def load_version(root: Path) -> str:
    """The version of core, which all distributions share."""
    return version_of(DISTRIBUTIONS[0], root)


def findings(release: Release) -> Iterator[str]:
    """Every defect of the release."""
    yield from versions(release)
    yield from changelog(release)
    for distribution in DISTRIBUTIONS:
        built = release.of(distribution)
        yield from _kinds(distribution, built)
        for each in built:
            yield from _says(release, each)
            yield from _requires(release, each)
            yield from _licence(release, each)
            yield from _contents(distribution, each)
            if each.is_sdist:
                yield from _as_in_tree(release, distribution, each)
    known = {distribution.name for distribution in DISTRIBUTIONS}
    for each in release.built:
        if each.metadata.name not in known:
            yield f"{each.path.name} is of no distribution of this repository: remove it"


def versions(release: Release) -> Iterator[str]:
    """Each pyproject.toml has the version of core."""
    for each in DISTRIBUTIONS:
        found = version_of(each, release.root)
        if found != release.version:
            yield (
                f"{each.folder}/pyproject.toml has version {found}, datadist has {release.version}: "
                "set the same one in both"
            )


def changelog(release: Release) -> Iterator[str]:
    """The first section of the changelog is that of this version, with a date and entries."""
    sections = HEADING.findall((release.root / "CHANGELOG.md").read_text())
    if not sections or sections[0][0] != release.version:
        first = sections[0][0] if sections else "nothing"
        yield f"CHANGELOG.md begins with {first}: expected a section for {release.version}"
        return
    _, rest, text = sections[0]
    if not DATED.fullmatch(rest):
        yield (
            f"CHANGELOG.md says '{release.version}{rest}': write the day of the release, as in "
            f"'{release.version} (2026-01-31)'"
        )
    if "- " not in text:
        yield f"the section for {release.version} in CHANGELOG.md has no entry"


def _kinds(distribution: Distribution, built: Iterable[Built]) -> Iterator[str]:
    """One sdist, and a wheel for everything that is supported."""
    built = list(built)
    if sum(each.is_sdist for each in built) != 1:
        yield f"{distribution.name}: expected one sdist in dist/; run make wheels"
    tags = {str(tag) for each in built for tag in each.tags}
    for tag in _expected(distribution):
        if tag not in tags:
            yield f"{distribution.name}: no wheel {tag} in dist/; run make wheels"


def _expected(distribution: Distribution) -> list[str]:
    if not distribution.native:
        return ["py3-none-any"]
    glibc = GLIBC.replace(".", "_")
    return [
        f"{python}-{abi}-manylinux_{glibc}_{machine}"
        for python, abi in REQUIRED
        for machine in MACHINES
    ]


def _says(release: Release, built: Built) -> Iterator[str]:
    """The metadata that an index shows and that pip decides by."""
    found = built.metadata
    if str(found.version) != release.version:
        yield f"{built.path.name} has version {found.version}, expected {release.version}"
    if not (found.description or "").strip() or found.description_content_type != "text/markdown":
        yield f"{built.path.name} has no readme in Markdown"
    if found.license_expression is None:
        yield f"{built.path.name} names no licence (License-Expression)"
    if not found.summary:
        yield f"{built.path.name} has no summary"
    if not found.classifiers:
        yield f"{built.path.name} has no classifiers"
    if found.requires_python is None or "3.9" in found.requires_python:
        yield f"{built.path.name} requires Python {found.requires_python}, expected 3.10 or later"


def _requires(release: Release, built: Built) -> Iterator[str]:
    """What it requires of our distributions is what is released now."""
    ours = {canonicalize_name(each.name) for each in DISTRIBUTIONS}
    for requirement in built.metadata.requires_dist or ():
        if canonicalize_name(requirement.name) in ours and not _admits(requirement, release):
            yield f"{built.path.name} requires {requirement}, which {release.version} is not"


def _admits(requirement: Requirement, release: Release) -> bool:
    return requirement.specifier.contains(release.version, prereleases=True)


def _licence(release: Release, built: Built) -> Iterator[str]:
    text = (release.root / "LICENSE").read_bytes()
    names = built.metadata.license_files or ()
    if not names:
        yield f"{built.path.name} has no licence file"
    for name in names:
        held = [
            data for path, data in built.files.items() if path.endswith(f"/{name}") or path == name
        ]
        if not held or any(data != text for data in held):
            yield f"{built.path.name}: {name} is not the LICENSE of this repository"


def _contents(distribution: Distribution, built: Built) -> Iterator[str]:
    """Wheels have our extension where there is one, and no library of anybody else."""
    libraries = [path for path in built.files if ".so" in Path(path).name]
    if len(libraries) != (distribution.native and not built.is_sdist):
        yield f"{built.path.name} has the libraries {libraries}: expected our extension alone"


def _as_in_tree(release: Release, distribution: Distribution, built: Built) -> Iterator[str]:
    """The sdist has the files that are in the working tree now."""
    folder = release.root / distribution.folder
    for path, data in built.files.items():
        if GENERATED.fullmatch(path):
            continue
        if not (folder / path).is_file() or (folder / path).read_bytes() != data:
            yield f"{built.path.name}: {path} differs from the working tree; run make wheels"

"""What the metadata of the installed distributions says of transports, without importing anything.

It is parsed here: one distribution whose metadata is damaged makes `importlib.metadata` raise for all
of them, and versions of Python differ in what they raise, and when.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from datadist.base.callers import pass_on
from datadist.base.texts import short_repr
from datadist.transport import ENTRY_POINT_GROUP

__all__ = ["Backend", "BrokenMetadata", "Installed", "named_directly", "scan"]

TARGET = re.compile(r"(?P<module>[^\W\d]\w*(\.[^\W\d]\w*)*)\s*:\s*[^\W\d]\w*(\.[^\W\d]\w*)*")
"""A module and what it has, as in entry points."""
EXTRAS = re.compile(r"\s*\[.*\]$")
OWN_PREFIX = "datadist_"


@dataclass(frozen=True)
class Backend:
    """An entry point, or a class that was named directly."""

    name: str
    distribution: str
    version: str
    target: str

    def __str__(self) -> str:
        return f"{self.name} ({self.distribution} {self.version})"

    @property
    def distributions(self) -> list[str]:
        """The distributions that it comes from: two where two transports are combined."""
        return self.distribution.split("+") if "+" in self.name else [self.distribution]

    @property
    def module(self) -> str:
        """The module that defines the class."""
        return self.target.partition(":")[0].strip()


@dataclass(frozen=True)
class BrokenMetadata:
    """Metadata of a distribution that cannot be used: where it lies, and what is wrong."""

    place: str
    problem: str

    def __str__(self) -> str:
        return f"the package metadata in {self.place} is damaged: {self.problem}"


@dataclass(frozen=True)
class Installed:
    """The transports that the metadata lists, by name, and the metadata that is damaged."""

    backends: tuple[Backend, ...]
    broken: tuple[BrokenMetadata, ...]


class _Damage(Exception):
    """What is wrong with the metadata of one distribution."""


def scan() -> Installed:
    """Read the metadata of everything on ``sys.path`` as it is now; raises nothing."""
    importlib.invalidate_caches()
    metadata.MetadataPathFinder().invalidate_caches()  # Python before 3.12 leaves this one out
    found: dict[tuple[str, str, str], Backend] = {}
    broken: dict[str, BrokenMetadata] = {}
    for distribution in _distributions(broken):
        try:
            backends = _backends(distribution)
        except Exception as error:
            pass_on(error)
            place = _place(distribution)
            broken.setdefault(place, BrokenMetadata(place, _text(error)))
            continue
        for backend in backends:
            # The first on the path is used, as in imports; an editable install is listed twice.
            found.setdefault((backend.name, backend.distribution, backend.target), backend)
    ordered = sorted(found.values(), key=lambda backend: (backend.name, backend.distribution))
    return Installed(tuple(ordered), tuple(broken.values()))


def named_directly(text: str) -> Backend | None:
    """The backend of ``module:Class``, which needs no metadata; None for other text.

    Its name is the module's package, without ``datadist_``: peers compare names, and options have them.
    """
    if not TARGET.fullmatch(text):
        return None
    package = re.split(r"[.:\s]", text, maxsplit=1)[0]
    return Backend(package.removeprefix(OWN_PREFIX), text, "without metadata", text)


def _distributions(broken: dict[str, BrokenMetadata]) -> Iterator[metadata.Distribution]:
    """Those of every finder. One that raises is asked for each part of the path by itself."""
    for finder in list(sys.meta_path):
        find = getattr(finder, "find_distributions", None)
        if find is None:
            continue
        try:
            found = list(find(metadata.DistributionFinder.Context()))
        except Exception as error:
            pass_on(error)
            found = []
            for part in list(sys.path):
                found += _found_in(part, finder, broken)
        yield from found


def _found_in(
    part: Any, finder: Any, broken: dict[str, BrokenMetadata]
) -> list[metadata.Distribution]:
    try:
        return list(finder.find_distributions(metadata.DistributionFinder.Context(path=[part])))
    except Exception as error:
        pass_on(error)
        place = f"{short_repr(part)}, a part of sys.path that {short_repr(finder)} searches,"
        broken.setdefault(place, BrokenMetadata(place, _text(error)))
        return []


def _backends(distribution: metadata.Distribution) -> list[Backend]:
    """Raises :class:`_Damage`, and whatever reading the files raises."""
    header = (
        _read(distribution, "METADATA")
        or _read(distribution, "PKG-INFO")
        or _read(distribution, "")
    )
    if not header:
        raise _Damage("it has no METADATA")
    name = _field(header, "Name")
    if name is None:
        raise _Damage("METADATA has no Name")
    entries = list(_entries(_read(distribution, "entry_points.txt") or ""))
    version = _field(header, "Version")
    if entries and version is None:
        raise _Damage("METADATA has no Version")
    return [Backend(point, name, version or "", target) for point, target in entries]


def _read(distribution: metadata.Distribution, name: str) -> str | None:
    try:
        return distribution.read_text(name)
    except UnicodeDecodeError as error:
        raise _Damage(
            f"{name or 'the file'} is not UTF-8 ({error.reason} at byte {error.start})"
        ) from error


def _field(header: str, name: str) -> str | None:
    """A field of METADATA; what follows the first empty line is a description."""
    match = re.search(rf"^{name}:[ \t]*(\S.*?)\s*$", header.partition("\n\n")[0], re.M | re.I)
    return match[1] if match else None


def _entries(text: str) -> Iterator[tuple[str, str]]:
    """Name and target of every entry point of our group. Raises :class:`_Damage`."""
    group = None
    for line in map(str.strip, text.splitlines()):
        if not line or line.startswith("#"):
            continue
        if line.startswith("[") and line.endswith("]"):
            group = line[1:-1].strip()
            continue
        name, sign, value = map(str.strip, line.partition("="))
        if not sign:
            raise _Damage(f"entry_points.txt has the line {short_repr(line)}, which has no '='")
        if group == ENTRY_POINT_GROUP:
            yield name, _target(name, EXTRAS.sub("", value))


def _target(name: str, value: str) -> str:
    if not name or not TARGET.fullmatch(value):
        raise _Damage(
            f"entry_points.txt has {short_repr(name)} = {short_repr(value)} in "
            f"[{ENTRY_POINT_GROUP}], expected name = module:Class"
        )
    return value


def _place(distribution: metadata.Distribution) -> str:
    """The folder of the metadata, as far as the finder tells."""
    path = getattr(distribution, "_path", None)
    try:
        place = os.fsencode(str(distribution.locate_file("") if path is None else path))
        return place.decode(errors="backslashreplace")  # which can be printed
    except Exception as error:
        pass_on(error)
        return short_repr(distribution)


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, _Damage) else f"{type(error).__name__}: {error}"

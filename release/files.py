"""What a file of dist/ says about itself."""

from __future__ import annotations

import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from packaging.metadata import Metadata
from packaging.tags import Tag
from packaging.utils import parse_wheel_filename

__all__ = ["Built", "read"]


@dataclass(frozen=True)
class Built:
    """An sdist or a wheel: its metadata, the tags of a wheel, and the bytes of each file by path."""

    path: Path
    metadata: Metadata
    tags: frozenset[Tag]
    files: dict[str, bytes]

    @property
    def is_sdist(self) -> bool:
        """Whether it is the source."""
        return not self.tags


def read(path: Path) -> Built:
    """Read a file of dist/. Raises ValueError where it is no distribution or its metadata is wrong."""
    if path.name.endswith(".tar.gz"):
        with tarfile.open(path) as archive:
            members = [member for member in archive.getmembers() if member.isfile()]
            files = {
                # Below the folder of the sdist, which is named after it.
                member.name.partition("/")[2]: _content(archive, member)
                for member in members
            }
        return Built(path, _metadata(path, files.get("PKG-INFO")), frozenset(), files)
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            files = {name: wheel.read(name) for name in wheel.namelist()}
        found = [text for name, text in files.items() if name.endswith(".dist-info/METADATA")]
        tags = parse_wheel_filename(path.name)[3]
        return Built(path, _metadata(path, found[0] if found else None), tags, files)
    raise ValueError(f"{path.name} is neither an sdist nor a wheel")


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    opened = archive.extractfile(member)
    return opened.read() if opened is not None else b""


def _metadata(path: Path, text: bytes | None) -> Metadata:
    if text is None:
        raise ValueError(f"{path.name} has no metadata")
    try:
        return Metadata.from_email(text)
    except (
        Exception
    ) as error:  # a group of InvalidMetadata, whose class depends on Python's version
        reasons = "; ".join(map(str, getattr(error, "exceptions", [error])))
        raise ValueError(f"the metadata of {path.name} is wrong: {reasons}") from None

"""A release without defects, made of little: each distribution has a pyproject.toml and a licence."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

from release.distributions import DISTRIBUTIONS, Distribution
from release.files import read
from release.findings import Release, load_version
from release.targets import MACHINES, REQUIRED

VERSION = "1.2.0"
LICENCE = b"Apache License\n"
METADATA = """\
Metadata-Version: 2.4
Name: {name}
Version: {version}
Summary: What it is
License-Expression: Apache-2.0
License-File: LICENSE
Classifier: Operating System :: POSIX :: Linux
Requires-Python: >=3.10
Requires-Dist: {requires}
Description-Content-Type: text/markdown

# {name}
"""


def make_tree(root: Path) -> None:
    """Write what a working tree has, as far as a release looks at it."""
    for each in DISTRIBUTIONS:
        folder = root / each.folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pyproject.toml").write_bytes(_project(each))
        (folder / "LICENSE").write_bytes(LICENCE)
    (root / "CHANGELOG.md").write_text(f"# Changes\n\n## {VERSION} (2026-01-31)\n\n- Something.\n")


def make_files(root: Path) -> Path:
    """Write what `make wheels` makes of that tree."""
    out = root / "dist"
    out.mkdir()
    for each in DISTRIBUTIONS:
        write_sdist(out, each)
        for tag in tags(each):
            write_wheel(out, each, tag)
    return out


def load(root: Path) -> Release:
    """The release as `make release-check` sees it."""
    built = [read(path) for path in sorted((root / "dist").iterdir())]
    return Release(root, load_version(root), built)


def tags(distribution: Distribution) -> list[str]:
    """The tags of its wheels, as auditwheel writes them."""
    if not distribution.native:
        return ["py3-none-any"]
    return [
        f"{python}-{abi}-manylinux2014_{machine}.manylinux_2_17_{machine}"
        for python, abi in REQUIRED
        for machine in MACHINES
    ]


def write_sdist(out: Path, distribution: Distribution, metadata: str = METADATA) -> None:
    """The source of a distribution, in place of one that is there."""
    name = f"{distribution.stem}-{VERSION}"
    files = {
        "PKG-INFO": fill(distribution, metadata).encode(),
        "pyproject.toml": _project(distribution),
        "LICENSE": LICENCE,
    }
    with tarfile.open(out / f"{name}.tar.gz", "w:gz") as archive:
        for path, data in files.items():
            member = tarfile.TarInfo(f"{name}/{path}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def write_wheel(
    out: Path, distribution: Distribution, tag: str, metadata: str = METADATA,
    others: tuple[str, ...] = (),
) -> None:  # fmt: skip
    """A wheel of a distribution, in place of one that is there; ``others``: more files in it."""
    name = f"{distribution.stem}-{VERSION}"
    with zipfile.ZipFile(out / f"{name}-{tag}.whl", "w") as wheel:
        wheel.writestr(f"{name}.dist-info/METADATA", fill(distribution, metadata))
        wheel.writestr(f"{name}.dist-info/licenses/LICENSE", LICENCE)
        for path in (*others, *([f"{distribution.stem}/_native.so"] * distribution.native)):
            wheel.writestr(path, b"")


def fill(distribution: Distribution, metadata: str) -> str:
    """The metadata of one distribution."""
    requires = "numpy" if distribution.name == "datadist" else "datadist<1.3,>=1.2"
    return metadata.format(name=distribution.name, version=VERSION, requires=requires)


def _project(distribution: Distribution) -> bytes:
    return f'[project]\nname = "{distribution.name}"\nversion = "{VERSION}"\n'.encode()

"""Entry points without an installation, for transports that only tests use."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from datadist.transport import ENTRY_POINT_GROUP


@contextmanager
def installed(
    transports: Mapping[str, str], distribution: str = "datadist-for-tests", version: str = "1.0"
) -> Iterator[Path]:
    """Make transports known by name, such as ``{"mine": "my_tests.module:MyTransport"}``.

    Puts the metadata of a distribution into a temporary directory at the head of ``sys.path``;
    processes of the kit, and those started by ``multiprocessing``, inherit that.
    """
    with tempfile.TemporaryDirectory(prefix="datadist-installed-") as folder:
        write_metadata(Path(folder), transports, distribution, version)
        sys.path.insert(0, folder)
        try:
            yield Path(folder)
        finally:
            sys.path.remove(folder)


def write_metadata(
    folder: Path, transports: Mapping[str, str], distribution: str, version: str
) -> None:
    """The metadata of an installed distribution that provides these transports."""
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        "Requires-Dist: datadist<0.2,>=0.1\n"
    )
    lines = [f"{name} = {target}" for name, target in transports.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{ENTRY_POINT_GROUP}]", *lines, ""]))

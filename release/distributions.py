"""The distributions of this repository, and what their pyproject.toml says."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["DISTRIBUTIONS", "ROOT", "Distribution", "project", "version_of"]

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Distribution:
    """One project with a pyproject.toml of its own."""

    name: str
    folder: str
    native: bool = False
    """It has an extension, thus a wheel per kind of Python and machine."""
    uploaded: bool = True

    @property
    def stem(self) -> str:
        """How the names of its files begin."""
        return self.name.replace("-", "_")


DISTRIBUTIONS = (
    Distribution("datadist", "."),
    Distribution("datadist-shm", "plugins/shm", native=True),
    Distribution("datadist-rdma", "plugins/rdma"),
    Distribution("datadist-hccl", "plugins/hccl"),
    Distribution("datadist-nixl", "plugins/nixl"),
    Distribution("pytest-datadist", "integrations/pytest"),
    Distribution("datadist-vllm", "integrations/vllm"),
    Distribution("datadist-ucx", "examples/datadist-ucx", uploaded=False),
)
"""In the order of uploading: each comes after those that it needs."""


def project(distribution: Distribution, root: Path = ROOT) -> dict[str, Any]:
    """The table `project` of its pyproject.toml."""
    text = (root / distribution.folder / "pyproject.toml").read_text()
    found: dict[str, Any] = tomllib.loads(text)["project"]
    return found


def version_of(distribution: Distribution, root: Path = ROOT) -> str:
    """The version in its pyproject.toml."""
    return str(project(distribution, root)["version"])

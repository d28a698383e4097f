"""Checks of this machine for the transports, with remedies; shown by `datadist doctor`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from datadist.diagnosis import (
    ascend,
    host,
    installed,
    limits,
    measured,
    namespaces,
    python,
    rdma,
    runtime_directory,
    system_calls,
)
from datadist.diagnosis.finding import Finding, Level

__all__ = ["Finding", "Level", "examine", "worst"]

PARTS = (
    python.examine,
    installed.examine,
    host.examine,
    system_calls.examine,
    namespaces.examine,
    runtime_directory.examine,
    rdma.examine,
    ascend.examine,
    measured.examine,
)
"""The interpreter first: loading plugins may turn the GIL on."""


def examine(backends: Sequence[str] = (), pool: int = 0) -> list[Finding]:
    """All findings; with ``backends`` only the findings that concern one of them.

    ``pool`` is the size of a pool that is wanted, in bytes.
    """
    findings = [*(finding for part in PARTS for finding in part()), *limits.examine(pool)]
    return [f for f in findings if not backends or not f.backends or f.backends & set(backends)]


def worst(findings: Iterable[Finding], backends: Iterable[str]) -> Level:
    """The highest level of the findings that concern all backends or one of ``backends``."""
    wanted = set(backends)
    levels = [f.level for f in findings if not f.backends or f.backends & wanted]
    return max(levels, default=Level.OK)

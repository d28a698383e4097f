"""Which transports are installed, and whether each can be used here."""

from __future__ import annotations

from collections.abc import Iterator

from datadist.base.quiet import quiet
from datadist.diagnosis.finding import Finding, Level, on
from datadist.transports.loader import REPAIR, how_to_begin, list_states
from datadist.transports.plugin_metadata import scan


def examine() -> Iterator[Finding]:
    """One finding per installed transport."""
    with quiet("datadist.backend"):
        rows = list_states()
    for broken in scan().broken:
        yield Finding("package metadata", Level.NOTE, str(broken), REPAIR)
    if not rows:
        yield Finding("transports", Level.NOTE, "none is installed", how_to_begin())
    for row in rows:
        yield Finding(
            f"backend {row.backend.name}",
            Level.OK if row.usable else Level.PROBLEM,
            f"{row.backend.distribution} {row.backend.version}: {row.reason}",
            "" if row.usable else "see what is reported about this backend below",
            on(row.backend.name),
        )

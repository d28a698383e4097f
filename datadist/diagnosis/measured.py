"""What the installed transports measure of this machine."""

from __future__ import annotations

from collections.abc import Iterator

from datadist.base.quiet import quiet
from datadist.diagnosis.finding import Finding, Level, on
from datadist.transports.loader import list_states, load_transport


def examine() -> Iterator[Finding]:
    """One finding for each figure of each transport that can be used here."""
    with quiet("datadist.backend"):
        usable = [row.backend.name for row in list_states() if row.usable]
        transports = [(name, load_transport(name)[1]) for name in usable]
    for name, transport in transports:
        for what, text in transport.measure().items():
            yield Finding(f"{name} {what}", Level.OK, text, "", on(name))

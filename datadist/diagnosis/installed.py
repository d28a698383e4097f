"""Which transports are installed, and whether each can be used here."""

from __future__ import annotations

from collections.abc import Iterator

from datadist.base.quiet import quiet
from datadist.diagnosis.finding import Finding, Level, on
from datadist.transports.loader import how_to_get, list_states


def examine() -> Iterator[Finding]:
    """One finding per installed transport."""
    with quiet("datadist.backend"):
        rows = list_states()
    if not rows:
        yield Finding(
            "transports", Level.PROBLEM, "none is installed",
            f"for one host install {how_to_get('shm')}; datadist-rdma is for RoCE, datadist-hccl for "
            "Ascend NPUs",
        )  # fmt: skip
    for row in rows:
        yield Finding(
            f"backend {row.backend.name}",
            Level.OK if row.usable else Level.PROBLEM,
            f"{row.backend.distribution} {row.backend.version}: {row.reason}",
            "" if row.usable else "see what is reported about this backend below",
            on(row.backend.name),
        )

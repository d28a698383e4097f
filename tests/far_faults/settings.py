"""What a round is run with: the transport, sizes, and the limits that it is judged by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from datadist.transport import FORCE_SECONDS
from datadist.transports.loader import list_states
from tests.far_faults.cases import Case
from tests.nodes import MIB

Memory = Literal["pool", "registered"]
MEMORIES: tuple[Memory, ...] = ("pool", "registered")

INTERFACES: Mapping[str, Mapping[str, str]] = {
    "ucx": {"DATADIST_UCX_DEVICE": "eth0"},
    "nixl": {"DATADIST_NIXL_DEVICE": "eth0"},
}
"""Variables that have a backend use the interface of its host."""

TENSORS, TENSOR = 4, 16 * MIB
SIZE = TENSORS * TENSOR
RATE = "200mbit"
"""Of a cable: a transfer takes some seconds."""
CALL_SECONDS = 1.5
"""Time limit of a call that is to time out; others have :data:`SYNC_SECONDS`."""
SYNC_SECONDS = 30.0
LINK_SECONDS = 20
SHORT_FORCE_SECONDS = 1.0
"""In place of FORCE_SECONDS, unless a round is to take the real one."""
PEER_TIMEOUT = 2
"""DATADIST_PEER_TIMEOUT: silence after which a host counts as dead, the least that there is."""
STOPPED_SECONDS = 1.0
"""An end is stopped for so long around the kill of the other one."""
WATCH_SECONDS = 2.0
"""Memory that is used again is watched for so long after the fault is over."""

CALL_MARGIN = 2.0
DEATH_LIMIT = 3.0
"""docs/faults.md: the longest time until a peer's death is seen."""
CABLE_LIMIT = 1.5 * PEER_TIMEOUT + CALL_MARGIN
"""docs/operations.md: at most one and a half times the timeout."""
QUARANTINE_MARGIN = 6.0
"""After the later one of FORCE_SECONDS and the end of the fault."""


@dataclass(frozen=True)
class Setting:
    """One round's."""

    backend: str
    memory: Memory = "pool"
    force_seconds: float = SHORT_FORCE_SECONDS
    quick: bool = False
    """A fault that lasts is ended once the mover has its error, before anything is forced to end."""
    environ: Mapping[str, str] = field(default_factory=dict)
    """Further variables of all processes."""
    defect: str | None = None
    """One of tests.far_faults.defects, to see that it is found."""
    patience: float = 0.0
    """Seconds that every limit is longer: where it matters that something ends, and not how fast."""

    @property
    def real(self) -> bool:
        """Whether FORCE_SECONDS is that of core."""
        return self.force_seconds == FORCE_SECONDS

    @property
    def variables(self) -> dict[str, str]:
        """Environment of the processes."""
        peer_timeout = {"DATADIST_PEER_TIMEOUT": str(PEER_TIMEOUT)}
        return {**INTERFACES.get(self.backend, {}), **peer_timeout, **self.environ}


def error_limit(case: Case) -> float:
    """Seconds within which a living end must see the fault; of a time-out, from the call on."""
    if case.cable:
        return CABLE_LIMIT
    return CALL_SECONDS + CALL_MARGIN if case.times_out else DEATH_LIMIT


def missing(backend: str) -> str | None:
    """Why there is no such backend here, or None."""
    row = next((row for row in list_states() if row.backend.name == backend), None)
    if row is None:
        return f"the transport {backend} is not installed"
    return None if row.usable else f"{backend}: {row.reason}"

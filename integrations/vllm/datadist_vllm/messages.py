"""What passes between the two halves of the connector, inside of one instance."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
)

from datadist_vllm.parameters import RankAddress, Source


@dataclass
class WorkerAddress(KVConnectorHandshakeMetadata):
    """What each worker tells the scheduler when its engine runs."""

    address: RankAddress


@dataclass
class Granting:
    """Open these blocks to the readers of the key, before the step computes the last of them."""

    request_id: str
    key: int
    blocks: list[int]


@dataclass
class Finished:
    """The scheduler keeps the request's blocks until its grants have ended."""

    request_id: str
    lease_seconds: float


@dataclass
class Load:
    """Read blocks of a source into blocks of this instance."""

    request_id: str
    source: Source
    positions: list[int]
    """In the granted blocks."""
    blocks: list[int]
    tokens: int
    """That the scheduler need not compute."""


@dataclass
class StepMetadata(KVConnectorMetadata):
    """What the workers hear in one step. Revocations come first: revoked blocks may be granted again."""

    revokes: list[str] = field(default_factory=list)
    grants: list[Granting] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    releases: list[Source] = field(default_factory=list)
    """Sources that nobody here will read."""
    cancels: list[str] = field(default_factory=list)
    """Requests that were aborted while they were loaded."""
    renewals: list[Source] = field(default_factory=list)
    """Sources of requests that wait here to be scheduled."""

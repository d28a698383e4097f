"""Records that members exchange if the transport's library connects them.

Each member gives its record to all others (:meth:`datadist.transport.Link.exchange`). From all
records it computes the members and the name of the domain, without any other message.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from datadist.base.parsing import parse
from datadist.control.job import described
from datadist.control.messages import WIRE_VERSION, Member, Name, Text, Token, UInt64
from datadist.control.runtime_dir import Address
from datadist.links.domain import TableDomain

MAX_ENDPOINTS = 16
MAX_ELEMENTS = 4096
"""Commas, brackets and braces, which texts may have, too."""


class MemberRecord(BaseModel):
    """The description that a member sends of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    wire: int
    job: Name
    incarnation: Token
    cluster_id: UInt64
    link: UInt64
    backend: Text
    one_sided: bool
    domain_key: Text
    """Digest of what it links: name, mapping and rank table."""
    attempt: Token
    """Differs from attempt to attempt, so that messages of an earlier one mean nothing to the next."""
    endpoints: Annotated[list[Text], Field(max_length=MAX_ENDPOINTS, fail_fast=True)]
    """Where it listens; empty without a key."""


def digest(domain: TableDomain) -> str:
    """Equal on all members of a domain, and on nobody else: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(domain.domain_key).encode()).hexdigest()[:32]


def make_record(domain: TableDomain, own: Address, endpoints: list[str]) -> bytes:
    """Our blob, for one attempt."""
    member_record = MemberRecord(
        wire=WIRE_VERSION,
        job=domain.job,
        incarnation=own.incarnation,
        cluster_id=own.cluster_id,
        link=domain.comm_id,
        backend=domain.announce.backend,
        one_sided=domain.announce.one_sided,
        domain_key=digest(domain),
        attempt=secrets.token_hex(16),
        endpoints=endpoints[:MAX_ENDPOINTS],
    )
    return member_record.model_dump_json().encode()


def read(domain: TableDomain, blobs: list[bytes]) -> tuple[str, dict[int, Member]]:
    """The domain's token and its members, from the blobs in rank order.

    Raises ``ValueError`` saying which rank does not fit, and why.
    """
    ranks = sorted(domain.ranks.values())
    if len(blobs) != len(ranks):
        raise ValueError(f"the transport exchanged {len(blobs)} blobs, expected {len(ranks)}")
    clusters = {rank: cluster for cluster, rank in domain.ranks.items()}
    said = {
        rank: _read(domain, rank, clusters[rank], blob)
        for rank, blob in zip(ranks, blobs, strict=True)
    }
    identity = [(rank, one.incarnation, one.link, one.attempt) for rank, one in said.items()]
    token = hashlib.sha256(json.dumps([digest(domain), identity]).encode()).hexdigest()[:32]
    return token, {rank: _member(rank, one) for rank, one in said.items()}


def _member(rank: int, said: MemberRecord) -> Member:
    return Member(
        rank=rank,
        cluster_id=said.cluster_id,
        incarnation=said.incarnation,
        link=said.link,
        endpoints=said.endpoints,
    )


def _read(domain: TableDomain, rank: int, cluster: int, blob: bytes) -> MemberRecord:
    try:
        said = parse(blob, MAX_ELEMENTS, MemberRecord.model_validate_json)
    except ValueError as error:
        raise ValueError(
            f"what rank {rank} exchanged is no introduction (another datadist release?): {error}"
        ) from None
    problem = _problem(domain, rank, cluster, said)
    if problem is not None:
        raise ValueError(problem)
    return said


def _problem(domain: TableDomain, rank: int, cluster: int, said: MemberRecord) -> str | None:
    own = domain.announce
    if said.wire != WIRE_VERSION:
        return (
            f"rank {rank} speaks control protocol {said.wire}, this engine {WIRE_VERSION}: install "
            "the same datadist release everywhere"
        )
    if said.job != domain.job:
        return (
            f"rank {rank} belongs to {described(said.job)}, this engine to {described(domain.job)}: set "
            "the same DATADIST_JOB everywhere"
        )
    if said.cluster_id != cluster:
        return f"ranks disagree: rank {rank} is cluster {said.cluster_id}, here cluster {cluster}"
    if said.domain_key != digest(domain):
        return f"ranks disagree: name, cluster_rank_info or rank table of rank {rank} differ"
    if said.backend != own.backend:
        return f"rank {rank} uses backend {said.backend}, rank {domain.rank} uses {own.backend}"
    if said.one_sided != own.one_sided:
        return (
            "enable_remote_cache_accessible must be equal on all ranks: rank "
            f"{rank} differs from rank {domain.rank}"
        )
    return None

"""The offers that both ends of a connection exchange: JSON, validated by the receiver."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from datadist.base.offers import check_version, overlap
from datadist.base.parsing import parse
from datadist.transport import LinkError, Offer
from datadist_rdma.ports import address_of
from datadist_rdma.queue_pair import End

BROADCAST = IPv4Address((1 << 32) - 1)
OFFER_VERSION: Literal[2] = 2
"""Version 1 had one queue pair."""
MAX_PAIRS = 64
"""Most queue pairs to one peer."""
MAX_ELEMENTS = 8 * Offer.MAX_REGIONS
"""Commas, brackets and braces: more than an offer of the most regions has."""

Number24 = Annotated[int, Field(ge=0, lt=1 << 24)]
PairNumber = Annotated[int, Field(ge=2, lt=1 << 24)]
"""Those below are of the management of the subnet."""
Number32 = Annotated[int, Field(ge=0, lt=1 << 32)]
Address = Annotated[int, Field(gt=0, lt=1 << 63)]


class RegionOffer(BaseModel):
    """A region that the peer may reach with ``key``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    address: Address
    size: Address
    key: Number32


class PairOffer(BaseModel):
    """A queue pair that waits for one of the peer's: the one of the same place in its offer."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    number: PairNumber
    psn: Number24


class OfferData(BaseModel):
    """The whole offer."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[2]
    queue_pairs: Annotated[
        list[PairOffer], Field(min_length=1, max_length=MAX_PAIRS, fail_fast=True)
    ]
    gid: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    mtu: Annotated[int, Field(ge=1, le=5)]
    reads: Annotated[int, Field(ge=1, le=255)]
    writable: bool
    regions: Annotated[list[RegionOffer], Field(max_length=Offer.MAX_REGIONS, fail_fast=True)]

    @field_validator("version", mode="before")
    @classmethod
    def _check_version(cls, version: object) -> object:
        return check_version(version, OFFER_VERSION, "datadist-rdma")

    @property
    def ends(self) -> list[End]:
        """The peer's ends of the connections."""
        gid = bytes.fromhex(self.gid)
        return [End(each.number, each.psn, gid, self.mtu, self.reads) for each in self.queue_pairs]


def make_offer(ends: Sequence[End], writable: bool, regions: list[RegionOffer]) -> bytes:
    """The bytes of our offer; the ends are those of queue pairs of one port."""
    pairs = [PairOffer(number=end.number, psn=end.psn) for end in ends]
    first = ends[0]
    offer = OfferData(
        version=OFFER_VERSION, queue_pairs=pairs, gid=first.gid.hex(), mtu=first.mtu, reads=first.reads,
        writable=writable, regions=regions,
    )  # fmt: skip
    return offer.model_dump_json().encode()


def parse_offer(rank: int, data: bytes) -> OfferData:
    """Read the offer of ``rank``. Raises LinkError."""
    try:
        offer = parse(data, MAX_ELEMENTS, OfferData.model_validate_json)
    except ValueError as error:
        raise LinkError(f"the offer of rank {rank} is not valid: {error}", rank) from None
    address = address_of(bytes.fromhex(offer.gid))
    if address.is_multicast or address.is_unspecified or address == BROADCAST:
        raise LinkError(
            f"the offer of rank {rank} has {address}, which is no address of a host", rank
        )
    if len({each.number for each in offer.queue_pairs}) < len(offer.queue_pairs):
        raise LinkError(f"the offer of rank {rank} has one queue pair twice", rank)
    for region in offer.regions:
        if region.address + region.size > 1 << 63:
            raise LinkError(f"a region in the offer of rank {rank} ends beyond memory", rank)
    shared = overlap([(region.address, region.size) for region in offer.regions])
    if shared is not None:
        raise LinkError(f"regions in the offer of rank {rank} overlap at {shared:#x}", rank)
    return offer

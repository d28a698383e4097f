"""The offers that both ends of a connection exchange: JSON, validated by the receiver."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from datadist.base.parsing import parse
from datadist.transport import LinkError, Offer
from datadist_rdma.memory import overlap
from datadist_rdma.queue_pair import End

OFFER_VERSION: Literal[1] = 1
MAX_ELEMENTS = 8 * Offer.MAX_REGIONS
"""Commas, brackets and braces: more than an offer of the most regions has."""

Number32 = Annotated[int, Field(ge=0, lt=1 << 32)]
Address = Annotated[int, Field(gt=0, lt=1 << 63)]


class RegionOffer(BaseModel):
    """A region that the peer may reach with ``key``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    address: Address
    size: Address
    key: Number32


class OfferData(BaseModel):
    """The whole offer."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = OFFER_VERSION
    queue_pair: Annotated[int, Field(ge=0, lt=1 << 24)]
    psn: Annotated[int, Field(ge=0, lt=1 << 24)]
    gid: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    mtu: Annotated[int, Field(ge=1, le=5)]
    reads: Annotated[int, Field(ge=0, le=255)]
    writable: bool
    regions: Annotated[list[RegionOffer], Field(max_length=Offer.MAX_REGIONS, fail_fast=True)]

    @property
    def end(self) -> End:
        """The peer's end of the connection."""
        return End(self.queue_pair, self.psn, bytes.fromhex(self.gid), self.mtu, self.reads)


def make_offer(end: End, writable: bool, regions: list[RegionOffer]) -> bytes:
    """The bytes of our offer."""
    offer = OfferData(
        queue_pair=end.number, psn=end.psn, gid=end.gid.hex(), mtu=end.mtu, reads=end.reads,
        writable=writable, regions=regions,
    )  # fmt: skip
    return offer.model_dump_json().encode()


def parse_offer(rank: int, data: bytes) -> OfferData:
    """Read the offer of ``rank``. Raises LinkError."""
    try:
        offer = parse(data, MAX_ELEMENTS, OfferData.model_validate_json)
    except ValueError as error:
        raise LinkError(f"the offer of rank {rank} is not valid: {error}", rank) from None
    for region in offer.regions:
        if region.address + region.size > 1 << 63:
            raise LinkError(f"a region in the offer of rank {rank} ends beyond memory", rank)
    shared = overlap([(region.address, region.size) for region in offer.regions])
    if shared is not None:
        raise LinkError(f"regions in the offer of rank {rank} overlap at {shared:#x}", rank)
    return offer

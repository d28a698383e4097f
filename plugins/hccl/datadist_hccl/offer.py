"""The offer of an owner to a peer: JSON that describes its memory, validated by the receiver."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from datadist.base.offers import check_version
from datadist.base.parsing import parse
from datadist.transport import LinkError, Offer
from datadist_hccl.resource import Resource

OFFER_VERSION: Literal[1] = 1
END = (1 << 63) - 1
"""Segments are compared with windows in int64: no region ends beyond this."""
Address = Annotated[int, Field(gt=0, le=END)]
MAX_ELEMENTS = 8 * Offer.MAX_REGIONS
"""Commas, brackets and braces: more than an offer of the most regions has."""


class RegionOffer(BaseModel):
    """One region; ``placement`` is a number of :class:`datadist.transport.Placement`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    address: Address
    size: Address
    placement: Annotated[int, Field(ge=0, le=1)]


class OfferData(BaseModel):
    """The whole offer."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1]
    writable: bool
    regions: Annotated[list[RegionOffer], Field(max_length=Offer.MAX_REGIONS, fail_fast=True)]
    resource: Resource | None = None
    """The owner's device, where there is no rank table."""

    @field_validator("version", mode="before")
    @classmethod
    def _check_version(cls, version: object) -> object:
        return check_version(version, OFFER_VERSION, "datadist-hccl")


def parse_offer(rank: int, offer: Offer) -> OfferData:
    """Read the offer of ``rank``. Raises :class:`LinkError`."""
    try:
        data = parse(offer.data, MAX_ELEMENTS, OfferData.model_validate_json)
    except ValueError as error:
        raise LinkError(f"the offer of rank {rank} is not valid: {error}", rank) from None
    regions = sorted((region.address, region.size) for region in data.regions)
    for (address, size), (second, _) in itertools.pairwise([*regions, (END, 0)]):
        if address + size > second:
            raise LinkError(
                f"the offer of rank {rank} is not valid: the region of {size} bytes at {address:#x} "
                "overlaps another one, or ends beyond memory",
                rank,
            )
    return data

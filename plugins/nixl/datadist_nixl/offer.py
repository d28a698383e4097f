"""The offers: where the owner of memory is asked for it, by what secret, and which ranges there are.

JSON, validated by the receiver.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from datadist.base.offers import check_version, overlap
from datadist.base.parsing import parse
from datadist.transport import LinkError, Offer
from datadist_nixl.wire import GREETING_BYTES, MEMORIES, SECRET_BYTES

OFFER_VERSION: Literal[1] = 1
MAX_ELEMENTS = 8 * Offer.MAX_REGIONS
"""Commas, brackets and braces: more than an offer of the most regions has."""

Number = Annotated[int, Field(gt=0, lt=1 << 63)]
Row = tuple[
    Number, Number, Annotated[str, Field(max_length=8)], Annotated[int, Field(ge=0, lt=1 << 16)]
]
"""Address, bytes, memory type, device."""


class OfferData(BaseModel):
    """The whole offer."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1]
    address: Annotated[str, Field(pattern=r"^(unix:[0-9a-z-]{1,90}|tcp:\S{1,90})$")]
    greeting: Annotated[str, Field(pattern=f"^[0-9a-f]{{{2 * GREETING_BYTES}}}$")]
    """What opens a connection to the process; the secret of the link opens its memory."""
    secret: Annotated[str, Field(pattern=f"^[0-9a-f]{{{2 * SECRET_BYTES}}}$")]
    writable: bool
    regions: Annotated[list[Row], Field(max_length=Offer.MAX_REGIONS, fail_fast=True, strict=False)]

    @field_validator("version", mode="before")
    @classmethod
    def _check_version(cls, version: object) -> object:
        return check_version(version, OFFER_VERSION, "datadist-nixl")


def make_offer(
    address: str, greeting: bytes, secret: bytes, writable: bool, regions: list[Row]
) -> bytes:
    """The bytes of our offer."""
    offer = OfferData(
        version=OFFER_VERSION, address=address, greeting=greeting.hex(), secret=secret.hex(),
        writable=writable, regions=regions,
    )  # fmt: skip
    return offer.model_dump_json().encode()


def parse_offer(rank: int, data: bytes) -> OfferData:
    """Read the offer of ``rank``. Raises LinkError."""
    try:
        offer = parse(data, MAX_ELEMENTS, OfferData.model_validate_json)
    except ValueError as error:
        raise LinkError(f"the offer of rank {rank} is not valid: {error}", rank) from None
    for address, size, memory, _ in offer.regions:
        if address + size > 1 << 63:
            raise LinkError(f"a region in the offer of rank {rank} ends beyond memory", rank)
        if memory not in MEMORIES:
            raise LinkError(f"a region in the offer of rank {rank} is of {memory!r}", rank)
    shared = overlap([(address, size) for address, size, _, _ in offer.regions])
    if shared is not None:
        raise LinkError(f"regions in the offer of rank {rank} overlap at {shared:#x}", rank)
    return offer

"""The offer of an owner to a peer: JSON that describes its memory, validated by the receiver."""

from __future__ import annotations

import fcntl
import itertools
import os
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from datadist.base.memory_file import RESIZE_SEALS
from datadist.base.parsing import parse
from datadist.base.texts import short_repr
from datadist.transport import LinkError, Offer
from datadist_shm.memory import F_SEAL_FUTURE_WRITE, PeerFile

OFFER_VERSION: Literal[1] = 1
MAX_ELEMENTS = 8 * Offer.MAX_REGIONS
"""Commas, brackets and braces: more than an offer of the most regions has."""

Address = Annotated[int, Field(gt=0, lt=1 << 63)]


class RegionOffer(BaseModel):
    """One region: ``fd`` is its descriptor's place in the offer, None for memory of the process."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: Annotated[int, Field(ge=0, lt=1 << 63)]
    address: Address
    size: Address
    fd: Annotated[int, Field(ge=0)] | None


class OfferData(BaseModel):
    """The whole offer; ``fence`` is the place of the fence page's descriptor."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = OFFER_VERSION
    writable: bool
    regions: Annotated[list[RegionOffer], Field(max_length=Offer.MAX_REGIONS, fail_fast=True)]
    fence: Annotated[int, Field(ge=0)] | None


def parse_offer(rank: int, data: bytes, fds: int) -> OfferData:
    """Read the offer of ``rank``, which came with ``fds`` descriptors. Raises LinkError."""
    try:
        offer = parse(data, MAX_ELEMENTS, OfferData.model_validate_json)
    except ValueError as error:
        raise LinkError(f"the offer of rank {rank} is not valid: {error}", rank) from None
    used = [region.fd for region in offer.regions if region.fd is not None]
    if offer.fence is not None:
        used.append(offer.fence)
    if sorted(used) != list(range(fds)):
        raise LinkError(
            f"the offer of rank {rank} names descriptors {short_repr(sorted(used))} and came with {fds}",
            rank,
        )
    if (offer.fence is not None) != offer.writable:
        raise LinkError(
            f"the offer of rank {rank} must have a fence exactly if it is writable", rank
        )
    ranges = sorted((region.address, region.size) for region in offer.regions)
    for (begin, size), (second, _) in itertools.pairwise(ranges):
        if begin + size > second:
            raise LinkError(f"regions in the offer of rank {rank} overlap at {second:#x}", rank)
    return offer


def check_descriptor(rank: int, fd: int, size: int) -> PeerFile:
    """What to map; raises LinkError unless ``fd`` is sealed memory of ``size`` bytes, of our user.

    Without the seals the owner could shrink it and so end this process with SIGBUS. The kernel tells
    which pages of a mapping exist to the user of the file only.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise LinkError(
            f"rank {rank} sent a descriptor that is no memory ({error})", rank
        ) from error
    if seals & RESIZE_SEALS != RESIZE_SEALS:
        raise LinkError(f"rank {rank} offers memory that it could still resize", rank)
    file = os.fstat(fd)
    if file.st_size != size:
        raise LinkError(f"rank {rank} offers {size} bytes in a file of {file.st_size} bytes", rank)
    if file.st_uid != os.geteuid():
        raise LinkError(f"rank {rank} offers memory of user {file.st_uid}, not of ours", rank)
    return PeerFile((file.st_dev, file.st_ino), bool(seals & F_SEAL_FUTURE_WRITE))

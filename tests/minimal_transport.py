"""A transport that declares little, for what the conformance kit asks only of such, and its saboteur."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from datadist.testing import ReferenceTransport
from datadist.testing.faulty_transports import FaultyTransport
from datadist.testing.reference import ReferenceLink
from datadist.transport import (
    Access,
    Capabilities,
    Group,
    Placement,
    Region,
    RegistrationError,
    Unsupported,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer


class DoesMoreThanItDeclares(ReferenceTransport):
    """Host memory of its own, to be read: so it says."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(
            super().capabilities, placements=frozenset({Placement.HOST}), foreign_memory=False,
            one_sided_write=False,
        )  # fmt: skip


class MinimalTransport(DoesMoreThanItDeclares):
    """And so it is."""

    def allocate(self, size: int, placement: Placement) -> Region:
        if placement is not Placement.HOST:
            raise RegistrationError(f"{placement} memory is not to be had")
        return super().allocate(size, placement)

    def register(self, address: int, size: int, placement: Placement) -> Region:
        raise RegistrationError("memory of others cannot be used")

    def open(self, group: Group, regions: Sequence[Region], access: Access) -> ReferenceLink:
        return _ReadingLink(group, regions, access)


class _ReadingLink(ReferenceLink):
    def write(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        raise Unsupported("this transport does not write")


MINIMAL_FAULTY_TRANSPORTS = tuple(
    FaultyTransport(DoesMoreThanItDeclares, test)
    for test in (
        "placements_that_are_not_declared_are_refused[Placement.DEVICE]",
        "foreign_memory_is_refused_where_not_declared",
        "writing_is_refused_where_not_declared",
    )
)

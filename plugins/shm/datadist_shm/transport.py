"""The transport class: what `datadist` finds by the entry point ``shm``."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Mapping as MappingType
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from datadist.transport import (
    Access,
    Availability,
    Capabilities,
    Group,
    Placement,
    Region,
    Transport,
    TransportError,
    TransportOptions,
)
from datadist_shm import _native, memory
from datadist_shm.link import ShmLink
from datadist_shm.memory import PeerMappings, PoolRegion, UserRegion

if TYPE_CHECKING:
    from typing_extensions import Buffer

OPTIONS = {
    "populate": "reserve and map all pages of pools ahead (default 1)",
    "ptracer": "let peers reach registered memory where kernel.yama.ptrace_scope is 1 (default 1)",
}


class ShmTransport(Transport):
    """Shared memory between the processes of one user on one host.

    Options (``datadist.shm.<name>``, "0" or "1"): ``populate``, ``ptracer``.
    """

    api_version: ClassVar[int] = 1
    priority: ClassVar[int] = 10

    @classmethod
    def probe(cls) -> Availability:
        """Usable on Linux with memfd_create."""
        if not sys.platform.startswith("linux"):
            return Availability(False, f"needs Linux, this is {sys.platform}")
        try:
            os.close(os.memfd_create("datadist-probe", os.MFD_CLOEXEC))
        except (AttributeError, OSError) as error:
            return Availability(False, f"memfd_create does not work here: {error}")
        return Availability(True, "shared memory of this host")

    def __init__(self, options: TransportOptions) -> None:
        unknown = sorted(set(options.extra) - set(OPTIONS))
        if unknown:
            known = ", ".join(f"{name}: {text}" for name, text in OPTIONS.items())
            raise TransportError(f"unknown option datadist.shm.{unknown[0]}; there are {known}")
        self._populate = _flag(options, "populate")
        self._ptracer = _flag(options, "ptracer")
        self._ids = itertools.count(1)
        self._mappings = PeerMappings()

    @property
    def capabilities(self) -> Capabilities:
        """HOST and DEVICE are labels: all memory is memory of the host."""
        both = frozenset(Placement)
        return Capabilities(
            placements=both, foreign_memory=True, same_host_only=True, host_addressable=both
        )

    def allocate(self, size: int, placement: Placement) -> Region:
        """A sealed memfd, populated unless the option ``populate`` is off."""
        return memory.allocate(next(self._ids), size, placement, self._populate)

    def register(self, address: int, size: int, placement: Placement) -> Region:
        """Memory of the user, which peers will read through our process."""
        memory.check_user_memory(address, size)
        memory.permit_access(self._ptracer)
        return UserRegion(next(self._ids), address, size, placement)

    def release(self, region: Region) -> None:
        """Close the region's descriptor; views keep the memory mapped as long as they live."""
        if isinstance(region, PoolRegion):
            region.close()

    def copy(self, dst: Buffer, src: Buffer, length: Buffer) -> None:
        """Local copies in native code."""
        _native.copy(dst, src, length)

    def open(self, group: Group, regions: Sequence[Region], access: Access) -> ShmLink:
        """Fix the access that peers get to the pools, and make this rank's side."""
        for region in regions:
            if isinstance(region, PoolRegion):
                memory.seal(region, writable=access is Access.READ_WRITE)
        return ShmLink(group, list(regions), access, self._mappings, self._populate)

    def close(self) -> None:
        """Nothing is left: links and regions were closed before."""

    def describe(self) -> MappingType[str, Any]:
        """The options in force."""
        return {"populate": self._populate, "ptracer": self._ptracer}


def _flag(options: TransportOptions, name: str) -> bool:
    value = options.extra.get(name, "1")
    if value not in ("0", "1"):
        raise TransportError(f'option datadist.shm.{name} is {value!r}, it must be "0" or "1"')
    return value == "1"

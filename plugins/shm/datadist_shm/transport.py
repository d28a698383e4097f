"""The transport class: what `datadist` finds by the entry point ``shm``."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Sequence
from collections.abc import Mapping as MappingType
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from datadist.base import shared_memory
from datadist.base.memory_map import KeptMappings
from datadist.transport import (
    Access,
    Availability,
    Capabilities,
    Combining,
    Group,
    Placement,
    Region,
    Transport,
    TransportOptions,
)
from datadist_shm import _native, memory, tuning
from datadist_shm.link import ShmLink
from datadist_shm.memory import PeerMappings, PoolRegion, UserRegion
from datadist_shm.options import KNOWN, Options
from datadist_shm.shared import SharedPart, SharedRegions, exposed

if TYPE_CHECKING:
    from typing_extensions import Buffer


PARALLEL = 16
"""Copies at a time per peer. Each uses a thread of the program, and a processor while it moves bytes: few
machines have more to spare, and a small transfer needs only one place beside large ones."""


class ShmTransport(Transport):
    """Shared memory between the processes of one user on one host.

    Options are ``datadist.shm.<name>``, see :data:`datadist_shm.options.KNOWN`.
    """

    api_version: ClassVar[int] = 2
    priority: ClassVar[int] = 10
    combining: ClassVar[Combining] = Combining.NEAR
    options: ClassVar[MappingType[str, str]] = KNOWN
    convert_list = staticmethod(_native.convert_list)

    @classmethod
    def probe(cls) -> Availability:
        """Usable on Linux with memory that can be sealed (memfd_create)."""
        if not sys.platform.startswith("linux"):
            return Availability(False, f"needs Linux, this is {sys.platform}")
        why = memory.unusable()
        return Availability(why is None, why or "shared memory of this host")

    @classmethod
    def measure(cls) -> MappingType[str, str]:
        """How fast each copy kernel is, how many threads help, and which pages pools have."""
        return {**tuning.measure(), "pages": memory.kind_of_pages()}

    def __init__(self, options: TransportOptions) -> None:
        self._options = Options.parse(options.extra)
        self._capabilities = _capabilities(self._options)
        self._ids = itertools.count(1)
        self._mappings = PeerMappings()
        self._mapped = KeptMappings()
        self._shared = SharedRegions(self._options)
        self._pagemap = -1
        with suppress(OSError):  # where it is closed to us, small transfers take longer
            self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)

    @property
    def capabilities(self) -> Capabilities:
        """HOST and DEVICE are labels: all memory is memory of the host."""
        return self._capabilities

    def allocate(self, size: int, placement: Placement) -> Region:
        """A sealed memfd, populated in the background unless the option ``populate`` is off."""
        return memory.allocate(next(self._ids), size, placement, self._options)

    def registering(self) -> AbstractContextManager[None]:
        """Look at the process's mappings once."""
        return self._mapped.kept()

    def register(self, address: int, size: int, placement: Placement) -> Region:
        """Memory of the user: that of `datadist.empty` is mapped by peers, else they read through us."""
        shared = shared_memory.find(address, size)
        if shared is not None:
            return self._shared.add(next(self._ids), shared, address, size, placement)
        memory.check_user_memory(self._mapped.get(), address, size)
        memory.permit_access(self._options.ptracer)
        return UserRegion(next(self._ids), address, size, placement)

    def release(self, region: Region) -> None:
        """Close the region's descriptor; views keep the memory mapped as long as they live."""
        if isinstance(region, PoolRegion):
            region.close()
        elif isinstance(region, SharedPart):
            self._shared.remove(region)

    def copy(self, dst: Buffer, src: Buffer, length: Buffer) -> None:
        """Local copies in native code, in several threads where source and target are apart."""
        options = self._options
        _native.copy(dst, src, length, options.copy_threads, options.kernel_number)

    def copies(self) -> MappingType[str, Callable[[Buffer, Buffer, Buffer], None]]:
        """Each kernel of this machine."""
        threads = self._options.copy_threads
        return {name: partial(_copy, threads, number) for name, number in _native.KERNELS.items()}

    def open(self, group: Group, regions: Sequence[Region], access: Access) -> ShmLink:
        """Fix the access that peers get to the pools, and make this rank's side."""
        shown = exposed(regions)
        for region in shown:
            if isinstance(region, PoolRegion):
                memory.seal(region, writable=access is Access.READ_WRITE)
        return ShmLink(group, shown, access, self._mappings, self._options, self._pagemap)

    def close(self) -> None:
        """Links and regions were closed before."""
        self._shared.close()
        pagemap, self._pagemap = self._pagemap, -1
        if pagemap >= 0:
            os.close(pagemap)

    def describe(self) -> MappingType[str, Any]:
        """The options in force."""
        options = self._options
        return {
            "populate": options.populate,
            "overcommit": options.overcommit,
            "ptracer": options.ptracer,
            "threads": abs(options.copy_threads),
            "huge_pages": options.huge_pages,
            "kernel": options.kernel,
        }


def _capabilities(options: Options) -> Capabilities:
    both = frozenset(Placement)
    return Capabilities(
        placements=both,
        foreign_memory=True,
        same_host_only=True,
        host_addressable=both,
        watches_control=True,
        parallel=PARALLEL,
        opens_at_once=options.populate,
        follows_addresses=True,
    )


def _copy(threads: int, kernel: int, dst: Buffer, src: Buffer, length: Buffer) -> None:
    _native.copy(dst, src, length, threads, kernel)

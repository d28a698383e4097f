"""Memory of one device and its host: regions, what HCCL knows of them, and local copies.

HCCL's registration of a region exists exactly as long as communicators use it. Only deregistering
revokes the access of peers that have mapped the memory; destroying a communicator does not. Memory
that is released while a communicator uses it is kept until that communicator is destroyed.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import weakref
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np

from datadist.base.memory_map import KeptMappings, MemoryMap, NotWritable
from datadist.transport import Placement, Region, RegistrationError, TransferError
from datadist_hccl import abi
from datadist_hccl.acl import AclError, Device
from datadist_hccl.one_sided import Hccl, HcclError
from datadist_hccl.segments import Int64Array, Windows

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger("datadist.hccl")

MAX_REGIONS = 4096
HCCS_ALIGNMENT = 2 << 20


_Range = tuple[Placement, int, int]


class _PinnedMemory:
    """Pinned memory of the host, aligned as that of the device, which goes with its last view."""

    def __init__(self, device: Device, size: int) -> None:
        allocated = device.runtime.malloc_host(size + HCCS_ALIGNMENT)
        self.address = -(-allocated // HCCS_ALIGNMENT) * HCCS_ALIGNMENT
        device.hold()
        weakref.finalize(self, _free_pinned, device, allocated).atexit = False


def _free_pinned(device: Device, address: int) -> None:
    try:
        with device.bound():
            device.runtime.call("aclrtFreeHost", address)
        device.drop()
    except AclError as error:
        log.error("cannot free pinned memory: %s", error)


class HcclRegion(Region):
    """A region, and how many communicators use it."""

    __slots__ = ("links", "owned", "released")

    def __init__(
        self, address: int, size: int, placement: Placement, owned: bool, keeper: object | None
    ) -> None:
        super().__init__(address, size, placement, keeper)
        self.owned = owned
        self.links = 0
        self.released = False

    @property
    def range(self) -> _Range:
        """The range that identifies a registration in HCCL."""
        return self.placement, self.address, self.size


@dataclass
class _Registration:
    """HCCL's handle of a range, and how many uses of it by communicators there are."""

    handle: int
    uses: int = 0
    tried: bool = False
    """Whether deregistering was tried already."""


class Memory:
    """All regions of a transport; every method works from any thread."""

    def __init__(self, device: Device, hccl: Hccl) -> None:
        self._device = device
        self._hccl = hccl
        self._lock = threading.Lock()
        self._regions: dict[HcclRegion, None] = {}
        self._registered: dict[_Range, _Registration] = {}
        self._mapped = KeptMappings()

    # -- regions -----------------------------------------------------------------------------

    def allocate(self, size: int, placement: Placement) -> HcclRegion:
        """Zeroed memory of the device in huge pages, or pinned memory of the host."""
        try:
            with self._device.bound():
                if placement is Placement.HOST:
                    pinned = _PinnedMemory(self._device, size)
                    ctypes.memset(pinned.address, 0, size)
                    return self._add(HcclRegion(pinned.address, size, placement, True, pinned))
                return self._allocate_on_device(size)
        except AclError as error:
            if error.code in abi.ACL_OUT_OF_MEMORY:
                raise MemoryError(str(error)) from error
            raise RegistrationError(str(error)) from error

    def _allocate_on_device(self, size: int) -> HcclRegion:
        runtime = self._device.runtime
        address = runtime.malloc(size)
        try:
            runtime.call("aclrtMemset", address, size, 0, size)
            return self._add(HcclRegion(address, size, Placement.DEVICE, True, None))
        except (AclError, RegistrationError):
            self._free(address)
            raise

    def _free(self, address: int) -> None:
        try:
            with self._device.bound():
                self._device.runtime.call("aclrtFree", address)
        except AclError as error:
            log.error("cannot free the memory at %#x: %s", address, error)

    def registering(self) -> AbstractContextManager[None]:
        """Look at the process's mappings once."""
        return self._mapped.kept()

    def register(self, address: int, size: int, placement: Placement) -> HcclRegion:
        """Memory of the user, which must lie where it is said to lie."""
        if placement is Placement.DEVICE:
            self._check_device_memory(address, size)
        else:
            check_host_memory(self._mapped.get(), address, size)
        return self._add(HcclRegion(address, size, placement, False, None))

    def _check_device_memory(self, address: int, size: int) -> None:
        """Copy the first and the last byte out, which fails for what is no memory of the device."""
        byte = ctypes.create_string_buffer(1)
        try:
            with self._device.bound():
                for place in (address, address + size - 1):
                    self._device.runtime.copy(ctypes.addressof(byte), place, 1, abi.DEVICE_TO_HOST)
        except AclError as error:
            raise RegistrationError(
                f"the {size} bytes at {address:#x} are not memory of device {self._device.number}: "
                f"{error}"
            ) from error

    def _add(self, region: HcclRegion) -> HcclRegion:
        with self._lock:
            if len(self._regions) >= MAX_REGIONS:
                raise RegistrationError(
                    f"{MAX_REGIONS} ranges are registered and HCCL takes no more: register larger "
                    "ranges that hold several tensors"
                )
            self._regions[region] = None
        return region

    def release(self, region: HcclRegion) -> None:
        """Give a region up: now, or when the last communicator that uses it is gone."""
        with self._lock:
            region.released = True
            self._free_unused([region])

    def release_all(self) -> None:
        """Give up what core has kept since a communicator may still use it: at the end of that one."""
        with self._lock:
            for region in self._regions:
                region.released = True

    def take(self, regions: Sequence[HcclRegion]) -> list[int]:
        """HCCL's handles of regions for a communicator; undone by :meth:`give_back`.

        Raises :class:`RegistrationError`.
        """
        taken: list[HcclRegion] = []
        try:
            with self._lock, self._device.bound():
                try:
                    for region in regions:
                        self._use(region)
                        taken.append(region)
                except HcclError as error:
                    self._give_back(taken)
                    raise RegistrationError(
                        f"cannot register {regions[len(taken)]!r}: {error}"
                    ) from error
                return [self._registered[region.range].handle for region in taken]
        except AclError as error:
            raise RegistrationError(f"cannot register memory: {error}") from error

    def _use(self, region: HcclRegion) -> None:
        """HCCL has one handle per range, also when it is registered again before its last end."""
        found = self._registered.get(region.range)
        if found is None:
            on_device = region.placement is Placement.DEVICE
            handle = self._hccl.register(region.address, region.size, on_device)
            found = self._registered[region.range] = _Registration(handle)
        found.uses += 1
        region.links += 1

    def give_back(self, regions: Iterable[HcclRegion]) -> list[HcclRegion]:
        """Undo :meth:`take`. Returns those that HCCL still knows, as other links use them.

        Raises :class:`AclError`, having done nothing.
        """
        with self._lock, self._device.bound():
            return self._give_back(list(regions))

    def _give_back(self, regions: Sequence[HcclRegion]) -> list[HcclRegion]:
        for region in regions:
            region.links -= 1
            registration = self._registered[region.range]
            registration.uses -= 1
            if registration.uses == 0:
                self._deregister(region, registration)
        self._free_unused([region for region in regions if region.released])
        return [region for region in regions if region.range in self._registered]

    def _deregister(self, region: HcclRegion, registration: _Registration) -> None:
        """Take a range away from peers; what fails is tried again, as a handle that is not known is
        refused.
        """
        try:
            self._hccl.call("HcclDeregisterGlobalMem", registration.handle)
        except HcclError as error:
            again, registration.tried = registration.tried, True
            if not (again and error.code == abi.HCCL_PARA):  # it was done at the first attempt
                log.error("%r stays registered, its memory is kept: %s", region, error)
                return
        del self._registered[region.range]

    def settle(self) -> None:
        """Try again what failed: deregister what no link uses, and free what was released.

        Raises :class:`AclError`.
        """
        with self._lock, self._device.bound():
            self._free_unused([region for region in self._regions if region.released])

    def _free_unused(self, regions: Iterable[HcclRegion]) -> None:
        for region in regions:
            kept = self._registered.get(region.range)
            if kept is not None and kept.uses == 0:
                self._deregister(region, kept)
                kept = self._registered.get(region.range)
            if region.links or (kept is not None and kept.uses == 0):
                continue
            del self._regions[region]
            region.keeper = None
            if region.owned and region.placement is Placement.DEVICE:
                self._free(region.address)

    def holding(self, regions: Iterable[Region]) -> list[tuple[int, int]]:
        """Address and size of what is registered of the device around ``regions``, each once.

        Raises :class:`RegistrationError` for a range that lies in nothing registered.
        """
        with self._lock:
            device = [r for r in self._regions if r.placement is Placement.DEVICE]
        ranges = sorted((region.address, region.size) for region in device)
        found = {}
        for wanted in regions:
            place = bisect_right(ranges, wanted.address, key=itemgetter(0)) - 1
            address, size = ranges[place] if place >= 0 else (0, 0)
            if wanted.address + wanted.size > address + size:
                raise RegistrationError(f"{wanted!r} lies in no registered memory of the device")
            found[address] = size
        return sorted(found.items())

    def windows(self, *placements: Placement) -> Windows:
        """All memory of these placements that was not given up, or is still kept."""
        with self._lock:
            return Windows(
                (region.address, region.size)
                for region in self._regions
                if region.placement in placements
            )

    @property
    def empty(self) -> bool:
        """Whether nothing is left."""
        return not self._regions

    # -- copies ------------------------------------------------------------------------------

    def copy(self, dst: Buffer, src: Buffer, length: Buffer) -> None:
        """Copy between any local memory; what is in no region of the device is the host's.

        Raises :class:`TransferError`.
        """
        to, frm, size = (np.frombuffer(buffer, np.int64) for buffer in (dst, src, length))
        kinds = 2 * self._on_device(frm) + self._on_device(to)
        try:
            with self._device.bound():
                for d, s, n, kind in zip(
                    to.tolist(), frm.tolist(), size.tolist(), kinds.tolist(), strict=True
                ):
                    if kind == abi.HOST_TO_HOST:
                        ctypes.memmove(d, s, n)
                    else:
                        self._device.runtime.copy(d, s, n, kind)
        except AclError as error:
            raise TransferError(f"a local copy failed: {error}", link_usable=True) from error

    def _on_device(self, addresses: Int64Array) -> Int64Array:
        inside: Int64Array = (self.windows(Placement.DEVICE).room_at(addresses) > 0).astype(
            np.int64
        )
        return inside


def check_host_memory(mapped: MemoryMap, address: int, size: int) -> None:
    """Raise :class:`RegistrationError` unless this process maps all of the range for writing."""
    try:
        mapped.check_writable(address, size)
    except NotWritable as error:
        raise RegistrationError(
            f"the {size} bytes at {address:#x} are not writable memory of this process: nothing of "
            f"that kind is mapped at {error.address:#x} (say Placement.DEVICE for memory of the NPU)"
        ) from None

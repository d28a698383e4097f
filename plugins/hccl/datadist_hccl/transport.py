"""The transport class: what `datadist` finds by the entry point ``hccl``."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from datadist.plugin_options import refuse_unknown
from datadist.rank_table import RankTable
from datadist.transport import (
    Access,
    Availability,
    Capabilities,
    Combining,
    Group,
    LinkError,
    OptionError,
    Placement,
    Region,
    RegistrationError,
    Transport,
    TransportError,
    TransportOptions,
)
from datadist_hccl import environment, table
from datadist_hccl.acl import AclError, Device, Runtime
from datadist_hccl.communicator import Communicator
from datadist_hccl.libraries import load
from datadist_hccl.link import HcclLink
from datadist_hccl.memory import HCCS_ALIGNMENT, HcclRegion, Memory
from datadist_hccl.one_sided import Hccl, HcclError
from datadist_hccl.resource import Resource, found, given
from datadist_hccl.staging import Staging
from datadist_hccl.table import Family, family_of, uses_rdma

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger("datadist.hccl")

GIB = 1 << 30
MAX_DEVICE_BYTES = 50 * GIB
MAX_HOST_BYTES = 20 * GIB
MAX_HOST_BYTES_SINCE_25_5 = 1024 * GIB
DRIVER_VERSION = Path("/usr/local/Ascend/driver/version.info")
MAX_NAME_BYTES = 127
CLOSE_ATTEMPTS = 2


class HcclTransport(Transport):
    """Ascend NPUs (Atlas A2 and A3) through HCCL's one-sided operations.

    It has no options ``datadist.hccl.*``; HCCL's own environment variables apply.
    """

    api_version: ClassVar[int] = 2
    priority: ClassVar[int] = 30
    combining: ClassVar[Combining] = Combining.NEVER
    options: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def probe(cls) -> Availability:
        """Usable where the libraries load, have every function, and show a supported device."""
        try:
            vendor = load()
            runtime = Runtime(vendor)
            runtime.initialise()
            count, soc = runtime.device_count(), runtime.soc_name()
        except (TransportError, AclError) as error:
            return Availability(False, str(error))
        except Exception as error:
            return Availability(False, f"{type(error).__name__}: {error}")
        if count == 0:
            return Availability(False, "no NPU is visible to this process")
        if family_of(soc) is None:
            return Availability(False, _unsupported(soc))
        return Availability(True, f"{count} x {soc}, {', '.join(vendor.libraries)}")

    def __init__(self, options: TransportOptions) -> None:
        refuse_unknown("hccl", options.extra, {})
        _check_quality(options)
        self._options = options
        self._roce = environment.settle(os.environ)
        """The kind of connections by the current variables; they may change until HCCL reads them."""
        self._vendor = load()
        runtime = Runtime(self._vendor)
        try:
            runtime.initialise()
            self._soc = runtime.soc_name()
            self._family = _supported(self._soc)
            count = runtime.device_count()
            if options.device_id >= count:
                raise OptionError(
                    f"option ge.exec.deviceId: LLMConfig.device_id is {options.device_id} and "
                    f"{count} NPUs are visible to this process "
                    "(ASCEND_RT_VISIBLE_DEVICES renumbers them from 0)"
                )
            self._device = Device(runtime, options.device_id)
        except AclError as error:
            raise TransportError(f"device {options.device_id} cannot be used: {error}") from error
        self._hccl = Hccl(self._vendor, runtime)
        self._memory = Memory(self._device, self._hccl)
        try:
            self._staging = Staging(self._memory)
        except (MemoryError, RegistrationError) as error:
            self._drop_device()
            raise TransportError(
                f"device {options.device_id} has no memory left: {error}"
            ) from error
        self._communicators: list[Communicator] = []
        self._noting = threading.Lock()
        """Held by the threads that open links, while they change that list."""
        self._closed = False

    @property
    def capabilities(self) -> Capabilities:
        """Documented limits of LLM-DataDist on NPUs; alignment is that of HCCS.

        One transfer at a time per rank: streams to one rank share a connection and its fence. Reads are
        not ordered: HCCL promises no order of the items of a batch.
        """
        return Capabilities(
            placements=frozenset(Placement),
            foreign_memory=True,
            same_host_only=False,
            host_addressable=frozenset({Placement.HOST}),
            alignment=1 if self._roce else HCCS_ALIGNMENT,
            max_registered={
                Placement.DEVICE: MAX_DEVICE_BYTES,
                Placement.HOST: host_limit(DRIVER_VERSION),
            },
            self_bootstrapping=True,
        )

    def check_table(self, rank_table: RankTable, rank: int) -> None:
        """Addresses, ids and order as HCCL needs them, and the variables of one server."""
        self._roce = environment.settle(os.environ)
        table.check(rank_table, rank, self._device.physical_id, self._family, self._roce)

    def allocate(self, size: int, placement: Placement) -> Region:
        """Memory of the device in huge pages of 2 MiB, or pinned memory of the host."""
        return self._memory.allocate(size, placement)

    def registering(self) -> AbstractContextManager[None]:
        """Look at the host's mappings once."""
        return self._memory.registering()

    def register(self, address: int, size: int, placement: Placement) -> Region:
        """Memory of the user: of the device (torch_npu), or of the host."""
        return self._memory.register(address, size, placement)

    def release(self, region: Region) -> None:
        """Release it at once, or when the last communicator that uses it is destroyed."""
        assert isinstance(region, HcclRegion)
        self._memory.release(region)

    def copy(self, dst: Buffer, src: Buffer, length: Buffer) -> None:
        """Local copies; each address is memory of the device if one of our regions says so."""
        self._memory.copy(dst, src, length)

    def remap(self, regions: Sequence[Region]) -> None:
        """HCCL's recovery after a fault of device memory: new keys for every open link.

        The keys are those of RDMA; over HCCS HCCL does nothing and reports success.
        """
        ranges = self._memory.holding(regions)
        for communicator in list(self._communicators):
            try:
                communicator.remap(ranges)
            except (HcclError, AclError) as error:
                raise RegistrationError(f"HCCL cannot remap memory: {error}") from error

    def open(self, group: Group, regions: Sequence[Region], access: Access) -> HcclLink:
        """Check what HCCL would refuse later, less clearly; the work is in :meth:`HcclLink.join`."""
        if len(group.name.encode()) > MAX_NAME_BYTES:
            raise LinkError(f"the name {group.name!r} has more than {MAX_NAME_BYTES} bytes")
        own = [region for region in regions if isinstance(region, HcclRegion)]

        def find_rdma_ranks(rank_table: RankTable) -> dict[int, bool]:
            self.check_table(rank_table, group.rank)
            rdma = self._connections(rank_table, group)
            if not all(rdma.values()):
                _check_alignment(own)
            return rdma

        resource = self._resource() if group.table is None else None
        communicator = Communicator(self._device, self._hccl, self._memory, group.name)
        try:
            link = HcclLink(
                group, own, access, self._device, communicator, self._staging, find_rdma_ranks, resource,
                self._options,
            )  # fmt: skip
        except TransportError:
            communicator.close(0.0)
            raise
        with self._noting:
            self._communicators = [c for c in self._communicators if not c.ended] + [communicator]
        return link

    def _connections(self, rank_table: RankTable, group: Group) -> dict[int, bool]:
        """Which of the other ranks are connected by RDMA."""
        own, roce = rank_table.device(group.rank), bool(self._roce)
        return {
            rank: uses_rdma(self._family, roce, own, rank_table.device(rank))
            for rank in group.peers
            if rank != group.rank
        }

    def _resource(self) -> Resource:
        """The description of our device for the other ranks, if there is no rank table."""
        text = self._options.local_comm_res
        try:
            if text:
                return given(text, self._device.physical_id)
            return found(self._device, self._family)
        except AclError as error:
            raise LinkError(
                f"the local resources cannot be found out, give local_comm_res: {error}"
            ) from error

    def close(self) -> None:
        """Destroy what links could not destroy, and release the device unless views need it."""
        if self._closed:
            return
        self._closed = True
        stuck = [c.name for c in self._communicators if not c.close(0.0)]
        if stuck:
            log.error(
                "device %d stays open until HCCL lets go of %s",
                self._device.number, ", ".join(stuck),
            )  # fmt: skip
        if not any(self._settle_memory() for _ in range(CLOSE_ATTEMPTS)) and not stuck:
            log.error("device %d stays open: HCCL keeps its memory", self._device.number)
            return
        self._drop_device()

    def _settle_memory(self) -> bool:
        """Whether all memory is given back."""
        try:
            self._staging.close()
            self._memory.release_all()
            self._memory.settle()
        except AclError as error:
            log.error("memory is not given back in order: %s", error)
        return self._memory.empty

    def _drop_device(self) -> None:
        try:
            self._device.drop()
        except AclError as error:
            log.error("device %d is not given back in order: %s", self._device.number, error)

    def describe(self) -> Mapping[str, Any]:
        """The device, and where the functions came from."""
        return {
            "soc": self._soc,
            "device": self._device.number,
            "physical device": self._device.physical_id,
            "libraries": self._vendor.libraries,
            "RoCE inside a server": self._roce,
        }


def host_limit(version_file: Path) -> int:
    """Bytes of host memory that may be registered: more since release 25.5 of the driver."""
    try:
        found = re.search(r"^Version\s*=\s*(\d+)\.(\d+)", version_file.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found and (int(found[1]), int(found[2])) >= (25, 5):
        return MAX_HOST_BYTES_SINCE_25_5
    return MAX_HOST_BYTES


def _supported(soc: str) -> Family:
    family = family_of(soc)
    if family is None:
        raise TransportError(_unsupported(soc))
    return family


def _unsupported(soc: str) -> str:
    return (
        f"the chip {soc or 'of unknown name'} is not supported: Atlas A2 (Ascend910B) and A3 "
        "(Ascend910_93) are"
    )


def _check_quality(options: TransportOptions) -> None:
    traffic, service = options.traffic_class, options.service_level
    if traffic is not None and (traffic > 255 or traffic % 4):
        raise OptionError(
            f"option llm.RdmaTrafficClass: LLMConfig.rdma_traffic_class is {traffic}, it must be a "
            "multiple of 4 in [0, 255]"
        )
    if service is not None and service > 7:
        raise OptionError(
            f"option llm.RdmaServiceLevel: LLMConfig.rdma_service_level is {service}, it must be in "
            "[0, 7]"
        )


def _check_alignment(regions: Sequence[HcclRegion]) -> None:
    for region in regions:
        if region.placement is Placement.DEVICE and region.address % HCCS_ALIGNMENT:
            raise LinkError(
                f"the {region.size} bytes at {region.address:#x} are not aligned to 2 MiB, which "
                "HCCS needs: align the memory of the cache, allocate it from the pool, or use RDMA "
                f"({environment.ROCE}=1)"
            )

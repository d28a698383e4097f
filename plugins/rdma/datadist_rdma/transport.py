"""The transport class: what `datadist` finds by the entry point ``rdma``."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from datadist.base.addresses import Address
from datadist.rank_table import RankTable
from datadist.transport import (
    Access,
    Availability,
    Capabilities,
    Combining,
    Group,
    LinkError,
    Placement,
    Region,
    Transport,
    TransportError,
    TransportOptions,
)
from datadist_rdma import memory, options, ports, verbs
from datadist_rdma.device import Device, listed
from datadist_rdma.link import RdmaLink
from datadist_rdma.memory import Ranges, RdmaRegion
from datadist_rdma.ports import Gid, NoPort

log = logging.getLogger("datadist.rdma")

_PLACEHOLDER = re.compile(r"[xX*]+(\.[xX*]+)*")
"""``x.x.x.x``, as documents and programs write it where an address is not used."""


class RdmaTransport(Transport):
    """RoCE v2 between hosts, and within one.

    Options: see :data:`datadist_rdma.options.KNOWN`, under ``datadist.rdma.<name>``.
    """

    api_version: ClassVar[int] = 2
    priority: ClassVar[int] = 20
    combining: ClassVar[Combining] = Combining.FAR
    options: ClassVar[Mapping[str, str]] = options.KNOWN

    @classmethod
    def probe(cls) -> Availability:
        """Usable where libibverbs knows a device with an active port that has a RoCE v2 address."""
        try:
            gids = _usable_gids()
        except verbs.NoDevices as error:
            return Availability(False, str(error))
        return Availability(True, f"RoCE v2 at {ports.choose(gids, ports.GidFilter(), None, '')}")

    def __init__(self, options_: TransportOptions) -> None:
        self._options = options.parse(options_, os.environ)
        try:
            self._gids = _usable_gids()
            self._library = verbs.Library()
            listening = _listen_address(options_)
            known = {gid.address for gid in self._gids}
            self._default = self._choose(listening if listening in known else None, "")
        except (verbs.NoDevices, NoPort) as error:
            raise TransportError(str(error)) from None
        self._lock = threading.Lock()
        self._devices: dict[str, Device] = {}
        self._regions: set[RdmaRegion] = set()
        self._ranges: dict[Device, Ranges] = {}
        if len({gid.device for gid in self._gids if self._options.gid_filter.fits(gid)}) == 1:
            self._device(self._default.device)

    def _choose(self, address: Address | None, origin: str) -> Gid:
        """The entry to use; the tables are read again where they have changed.

        Raises :class:`NoPort` or :class:`verbs.NoDevices`.
        """
        with contextlib.suppress(NoPort):
            gid = ports.choose(self._gids, self._options.gid_filter, address, origin)
            if ports.is_current(gid):
                return gid
        self._gids = _usable_gids()
        return ports.choose(self._gids, self._options.gid_filter, address, origin)

    @property
    def capabilities(self) -> Capabilities:
        """HOST and DEVICE are labels: all memory is memory of the host.

        Reads are not ordered. A queue pair answers them in order, but nothing says that its adapter
        reads its memory in that order: PCI Express lets one read pass another.
        """
        both = frozenset(Placement)
        return Capabilities(
            placements=both, foreign_memory=True, same_host_only=False, host_addressable=both,
            parallel=self._options.queue_pairs,
        )  # fmt: skip

    # -- devices -----------------------------------------------------------------------------

    def check_table(self, table: RankTable, rank: int) -> None:
        """``device_ip`` of our rank, if given, must be a RoCE v2 address of this host."""
        self._from_table(table, rank)

    def _from_table(self, table: RankTable | None, rank: int) -> Gid | None:
        text = table.device(rank).device_ip if table is not None else None
        if text is None or _PLACEHOLDER.fullmatch(text):
            return None
        try:
            return self._choose(ports.parse(text), f"device_ip of rank {rank}")
        except (ValueError, NoPort, verbs.NoDevices) as error:
            raise LinkError(
                f"rank table, device_ip of rank {rank}: {error}; give the RoCE address of that "
                "rank's host, or leave device_ip out",
                rank,
            ) from None

    def _gid_for(self, group: Group, rank: int) -> Gid:
        """Our GID for a peer: that of the table, else of the route to the peer, else the default."""
        from_table = self._from_table(group.table, group.rank)
        if from_table is not None:
            return from_table
        address = group.peers[rank].address
        source = ports.route_source(address) if address else None
        if source is not None and source.is_loopback:
            source = None
        try:
            return self._routed(rank, source)
        except (NoPort, verbs.NoDevices) as error:
            raise LinkError(f"no route to rank {rank}: {error}", rank) from None

    def _routed(self, rank: int, source: Address | None) -> Gid:
        try:
            return self._choose(source, f"the route to rank {rank}")
        except NoPort:
            adapters = {gid.device for gid in self._gids if self._options.gid_filter.fits(gid)}
            if len(adapters) == 1:
                return self._choose(None, "")
            raise NoPort(
                f"it is reached from {source}, which is no RoCE v2 address, and several adapters "
                f"could be meant ({', '.join(sorted(adapters))}): set device_ip in the rank table, "
                "or the option datadist.rdma.device"
            ) from None

    def _device(self, name: str) -> Device:
        """The device, opened on first use; it then knows all memory."""
        with self._lock:
            if name not in self._devices:
                device = Device(self._library, name)
                try:
                    for region in self._regions:
                        region.register(device)
                except BaseException:
                    for region in self._regions:
                        region.deregister(device)
                    device.close()
                    raise
                self._devices[name] = device
                self._index()
            return self._devices[name]

    # -- memory ------------------------------------------------------------------------------

    def allocate(self, size: int, placement: Placement) -> Region:
        """Anonymous memory, registered with every device in use."""
        return self._add(memory.allocate(size, placement))

    def register(self, address: int, size: int, placement: Placement) -> Region:
        """Memory of the user, registered with every device in use."""
        return self._add(RdmaRegion(address, size, placement))

    def _add(self, region: RdmaRegion) -> RdmaRegion:
        with self._lock:
            try:
                for device in self._devices.values():
                    region.register(device)
            except BaseException:
                region.close()
                raise
            self._regions.add(region)
            self._index()
        return region

    def release(self, region: Region) -> None:
        """Deregister; own memory is unmapped when no view uses it any more."""
        assert isinstance(region, RdmaRegion)
        with self._lock:
            self._regions.discard(region)
            self._index()
            region.close()

    def _index(self) -> None:
        self._ranges = {
            device: Ranges((r.address, r.size, r.keys(device)[0]) for r in self._regions)
            for device in self._devices.values()
        }

    def _local(self, device: Device) -> Ranges:
        """All our memory with its local keys on a device."""
        return self._ranges[device]

    # -- links -------------------------------------------------------------------------------

    def open(self, group: Group, regions: Sequence[Region], access: Access) -> RdmaLink:
        """Choose device and address for each peer, and make our ends of the connections."""
        places = {}
        for rank in group.peers:
            if rank != group.rank:
                gid = self._gid_for(group, rank)
                places[rank] = (self._device(gid.device), gid)
        own = [region for region in regions if isinstance(region, RdmaRegion)]
        return RdmaLink(self._local, group, places, own, access, self._options)

    def close(self) -> None:
        """Close the devices; links and regions were closed before."""
        with self._lock:
            for region in list(self._regions):
                region.close()
            self._regions.clear()
            for device in self._devices.values():
                device.close()
            self._devices.clear()
            self._ranges.clear()

    def describe(self) -> Mapping[str, Any]:
        """The address in use by default, and the options in force."""
        settings = self._options
        return {
            "gid": str(self._default),
            "interface": self._default.interface,
            "traffic_class": settings.traffic_class,
            "service_level": settings.service_level,
            "timeout": settings.timeout,
            "retry_count": settings.retry_count,
            "queue_pairs": settings.queue_pairs,
            "peer lost after about (s)": round(settings.peer_lost_seconds, 3),
        }


def _usable_gids() -> list[Gid]:
    """RoCE v2 entries of devices that libibverbs knows. Raises :class:`verbs.NoDevices`."""
    if not sys.platform.startswith("linux"):
        raise verbs.NoDevices(f"needs Linux, this is {sys.platform}")
    library = verbs.Library()
    with listed(library) as devices:
        names = set(devices)
    if not names:
        raise verbs.NoDevices(
            "there is no RDMA device (rdma link shows them; soft-RoCE: rdma link add)"
        )
    gids, reasons = ports.list_gids()
    usable = [gid for gid in gids if gid.device in names]
    if not usable:
        raise verbs.NoDevices(
            "no RDMA port can be used: "
            + ("; ".join(reasons) or f"{', '.join(sorted(names))} has no port")
        )
    return usable


def _listen_address(given: TransportOptions) -> Address | None:
    if given.listen_address is None:
        return None
    try:
        return ports.parse(given.listen_address)
    except ValueError:
        return None

"""A transport for tests that may leave the host: core has to meet its peers over the network.

It moves bytes with process_vm_readv, which network namespaces of one kernel do not hinder. Without
an entry point of its own nothing finds it: :func:`publish` makes one, in a directory of the test.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from datadist.transport import (
    API_VERSION,
    Access,
    AddressError,
    Availability,
    Capabilities,
    Group,
    Link,
    LinkError,
    Offer,
    PeerLost,
    Placement,
    Region,
    RegistrationError,
    TransferError,
    Transport,
    TransportOptions,
    Unsupported,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

_libc = ctypes.CDLL(None, use_errno=True)


class _Span(ctypes.Structure):
    _fields_: ClassVar = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]


def publish(directory: Path) -> None:
    """Write the metadata of an installed distribution with the transports of this module."""
    info = directory / "netcopy-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: netcopy\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[datadist.transports]\n"
        "netcopy = tests.netcopy:NetCopy\n"
        "netcopy-fds = tests.netcopy:NetCopyWithDescriptors\n"
        "netjoin = tests.netjoin:NetJoin\n"
    )


def install(_here: object, directory: str) -> None:
    """Make it visible in this process."""
    sys.path.append(directory)


class NetCopyLink(Link):
    """Reads and writes in the peers' processes."""

    def __init__(self, group: Group, regions: Sequence[Region], access: Access) -> None:
        self._group = group
        self._access = access
        self._regions = [(r.address, r.size) for r in regions]
        self._peers: dict[int, tuple[int, list[tuple[int, int]], bool]] = {}
        self._aborted: set[int] = set()
        self._lock = threading.Lock()

    def offer(self, rank: int) -> Offer:
        writable = self._access is Access.READ_WRITE
        return Offer(json.dumps([os.getpid(), self._regions, writable]).encode())

    def attach(self, rank: int, offer: Offer) -> None:
        if offer.fds:
            raise LinkError("descriptors came with the offer", rank)
        pid, regions, writable = json.loads(offer.data)
        self._peers[rank] = (pid, [(a, s) for a, s in regions], writable)

    def read(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        self._move(_libc.process_vm_readv, rank, local, remote, length)

    def write(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        if not self._peers[rank][2]:
            raise Unsupported("the peer grants READ only")
        self._move(_libc.process_vm_writev, rank, local, remote, length)

    def _move(
        self, call: ctypes._NamedFuncPointer, rank: int, local: Buffer, remote: Buffer, size: Buffer
    ) -> None:
        pid, regions, _ = self._peers[rank]
        columns = [memoryview(c).cast("B").cast("q") for c in (local, remote, size)]
        segments = list(zip(*columns, strict=True))
        for _, there, count in segments:
            if not any(a <= there and there + count <= a + s for a, s in regions):
                raise AddressError(f"{there:#x} is outside the offer of rank {rank}")
        for here, there, count in segments:
            if rank in self._aborted:
                raise TransferError("aborted")
            ours, theirs = _Span(here, count), _Span(there, count)
            done = call(pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
            if done != count:
                raise PeerLost(os.strerror(ctypes.get_errno()), rank)

    def abort(self, rank: int) -> None:
        with self._lock:
            self._aborted.add(rank)

    def close(self) -> frozenset[int]:
        return frozenset()


class NetCopy(Transport):
    """Ranks on any host."""

    api_version = API_VERSION
    priority = -100

    @classmethod
    def probe(cls) -> Availability:
        return Availability(True, "for tests")

    def __init__(self, options: TransportOptions) -> None:
        self.device = options.device_id

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            placements=frozenset(Placement),
            foreign_memory=True,
            same_host_only=False,
            host_addressable=frozenset(Placement),
        )

    def allocate(self, size: int, placement: Placement) -> Region:
        try:
            memory = mmap.mmap(-1, size)
        except OSError as error:
            raise RegistrationError(str(error)) from error
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        return Region(address, size, placement, memory)

    def register(self, address: int, size: int, placement: Placement) -> Region:
        return Region(address, size, placement)

    def release(self, region: Region) -> None:
        pass

    def open(self, group: Group, regions: Sequence[Region], access: Access) -> Link:
        return NetCopyLink(group, regions, access)

    def close(self) -> None:
        pass


class _DescriptorLink(NetCopyLink):
    def offer(self, rank: int) -> Offer:
        return Offer(super().offer(rank).data, [os.open("/dev/null", os.O_RDONLY)])


class NetCopyWithDescriptors(NetCopy):
    """Breaks the rule that descriptors stay on the host."""

    def open(self, group: Group, regions: Sequence[Region], access: Access) -> Link:
        return _DescriptorLink(group, regions, access)

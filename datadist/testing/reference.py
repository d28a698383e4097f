"""A complete example of a transport: the kernel copies between the processes of one host.

``process_vm_readv`` and ``process_vm_writev`` take the place of hardware: they access the memory of
another process without its help. An offer contains the addresses of the memory. Write access that
was granted cannot be revoked. So `close` returns the peers that have it, and core keeps the memory
until they answer or are gone.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from datadist import transport as spi
from datadist.base.texts import in_seconds
from datadist.transport import Access, Placement

if TYPE_CHECKING:
    from typing_extensions import Buffer

FORMAT = "reference 1"
PIECE = 1 << 20
"""Bytes that are copied between two checks of the deadline."""
PARALLEL = 4
"""Transfers at a time with one peer: nothing is shared by them, so any number would do."""
LIBC = ctypes.CDLL(None, use_errno=True)  # its calls release the GIL
ZERO, ONE = ctypes.c_ulong(0), ctypes.c_ulong(1)
PR_SET_PTRACER, PTRACER_ANY = 0x59616D61, ctypes.c_ulong(-1)


class Path(NamedTuple):
    """An attached peer: its process, and begin and end of each range that it offered."""

    rank: int
    pid: int
    pidfd: int
    writable: bool
    ranges: list[tuple[int, int]]

    def copy(self, call: Callable[..., int], local: int, remote: int, size: int) -> None:
        """One system call; its errors are converted to those of the interface."""
        here, there = (ctypes.c_size_t * 2)(local, size), (ctypes.c_size_t * 2)(remote, size)
        try:
            signal.pidfd_send_signal(self.pidfd, 0)  # fails if the process has ended
            done = call(self.pid, here, ONE, there, ONE, ZERO)
            if done != size:
                code = ctypes.get_errno() if done < 0 else errno.EFAULT
                raise OSError(code, os.strerror(code))
        except ProcessLookupError:
            raise spi.PeerLost(f"the process of rank {self.rank} has ended", self.rank) from None
        except OSError as error:
            raise spi.TransferError(f"rank {self.rank}: {error}", link_usable=True) from None


class ReferenceLink(spi.Link):
    """See :class:`datadist.transport.Link`."""

    def __init__(self, group: spi.Group, regions: Sequence[spi.Region], access: Access) -> None:
        self._group = group
        self._ranges = [(region.address, region.address + region.size) for region in regions]
        self._writable = access is Access.READ_WRITE
        self._offered: set[int] = set()
        self._paths: dict[int, Path] = {}
        self._ended: set[int] = set()
        self._running = {rank: threading.Semaphore(PARALLEL) for rank in group.peers}

    def offer(self, rank: int) -> spi.Offer:
        """The addresses of our memory. Core tells the peer our process id."""
        self._offered.add(rank)
        return spi.Offer(json.dumps([FORMAT, self._writable, self._ranges]).encode())

    def attach(self, rank: int, offer: spi.Offer) -> None:
        """Store the offer, and read one byte to find a missing permission now rather than later."""
        for fd in offer.fds:  # our offers have none, but we must close any that arrive
            os.close(fd)
        peer, byte = self._group.peers[rank], ctypes.c_char()
        try:
            form, writable, ranges = json.loads(offer.data)
            if form != FORMAT:
                raise ValueError(f"its format is {form!r}, expected {FORMAT!r}")
            if peer.pid is None or peer.pidfd is None:
                raise ValueError(
                    "the kernel shows no process of it (is it in another pid namespace?)"
                )
            spans = [(int(begin), int(end)) for begin, end in ranges]
            path = Path(rank, peer.pid, peer.pidfd, bool(writable), spans)
            for begin, _ in spans[:1]:
                path.copy(LIBC.process_vm_readv, ctypes.addressof(byte), begin, 1)
        except (ValueError, TypeError, spi.TransferError) as error:
            raise spi.LinkError(f"the offer of rank {rank} is of no use: {error}", rank) from error
        self._paths[rank] = path

    def read(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        """Copy from the peer's process."""
        self._move(LIBC.process_vm_readv, rank, (local, remote, length), timeout)

    def write(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        """Copy to the peer's process. The kernel does not check the granted access, so we do."""
        if rank in self._paths and not self._paths[rank].writable:
            raise spi.Unsupported(f"rank {rank} granted read access only")
        self._move(LIBC.process_vm_writev, rank, (local, remote, length), timeout)

    def _move(
        self, call: Callable[..., int], rank: int, vectors: Sequence[Buffer], timeout: float
    ) -> None:
        deadline = time.monotonic() + timeout
        segments = list(zip(*(memoryview(v).cast("B").cast("q") for v in vectors), strict=True))
        with self._running[rank]:
            if rank not in self._paths:
                raise spi.TransferError(f"rank {rank} was not attached")
            path = self._paths[rank]
            for _, there, size in segments:  # all segments, before any byte is moved
                if not any(begin <= there and there + size <= end for begin, end in path.ranges):
                    raise spi.AddressError(f"rank {rank} did not offer {size} bytes at {there:#x}")
            for here, there, size in segments:
                for at in range(0, size, PIECE):
                    if rank in self._ended:
                        raise spi.TransferError("the link was aborted or closed")
                    if time.monotonic() >= deadline:
                        raise spi.TransferTimeout(
                            f"not done in {in_seconds(timeout)}", link_usable=True
                        )
                    path.copy(call, here + at, there + at, min(PIECE, size - at))

    def abort(self, rank: int) -> None:
        """Set a flag that a transfer checks before each piece."""
        self._ended.add(rank)

    def close(self) -> frozenset[int]:
        """Wait for our own transfers; we cannot end those of peers with write access."""
        for rank, running in self._running.items():
            self.abort(rank)
            for _ in range(PARALLEL):
                running.acquire()
            running.release(PARALLEL)  # those that come later find that it has ended
        return frozenset(self._offered if self._writable else ())


class ReferenceTransport(spi.Transport):
    """HOST and DEVICE are only labels: both are memory of the host."""

    api_version: ClassVar[int] = 2

    @classmethod
    def probe(cls) -> spi.Availability:
        """Usable on Linux. Only `attach` can tell whether we may access a certain process."""
        if not hasattr(LIBC, "process_vm_readv"):
            return spi.Availability(False, "this system has no process_vm_readv")
        return spi.Availability(True, "copies between the processes of this host")

    def __init__(self, options: spi.TransportOptions) -> None:
        if options.extra:
            raise spi.OptionError(f"unknown option {min(options.extra)}: there are none")
        LIBC.prctl(
            PR_SET_PTRACER, PTRACER_ANY
        )  # with Yama we must permit other processes to access ours

    @property
    def capabilities(self) -> spi.Capabilities:
        """All capabilities, on one host only."""
        both = frozenset(Placement)
        return spi.Capabilities(
            placements=both, foreign_memory=True, same_host_only=True, host_addressable=both,
            parallel=PARALLEL,
            revokes_access=False,
            follows_addresses=True,
        )  # fmt: skip

    def allocate(self, size: int, placement: Placement) -> spi.Region:
        """Anonymous memory, which is freed with the last reference to the keeper."""
        try:
            keeper = (ctypes.c_char * size).from_buffer(mmap.mmap(-1, size))
        except (OSError, OverflowError, ValueError) as error:
            raise MemoryError(f"{size} bytes: {error}") from error
        return spi.Region(ctypes.addressof(keeper), size, placement, keeper)

    def register(self, address: int, size: int, placement: Placement) -> spi.Region:
        """Memory of the user. msync with MS_ASYNC tells whether it is mapped, and does nothing else."""
        first = address & -mmap.PAGESIZE
        if LIBC.msync(ctypes.c_void_p(first), ctypes.c_size_t(address + size - first), 1):
            raise spi.RegistrationError(f"the {size} bytes at {address:#x} are not mapped here")
        return spi.Region(address, size, placement)

    def release(self, region: spi.Region) -> None:
        """Nothing to do: the keeper alone holds the memory."""
        region.keeper = None

    def open(
        self, group: spi.Group, regions: Sequence[spi.Region], access: Access
    ) -> ReferenceLink:
        """There is nothing to prepare."""
        return ReferenceLink(group, regions, access)

    def close(self) -> None:
        """There is nothing to free."""

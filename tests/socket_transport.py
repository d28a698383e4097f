"""A transport for the tests of the conformance kit: the owner's own threads move the bytes.

What the kit asks where ``passive_target`` is False needs one that passes; see also
:mod:`tests.faulty_socket_transports`. Who offers makes a pair of connected sockets, answers requests on
one end with a thread, and gives the other end to the peer as a descriptor of the offer.

A request is a header, the owner's addresses and the lengths; the answer is one byte. Then the data
follows, in the order of the segments, and for a write another byte when it is in place.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import socket
import struct
import termios
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from datadist.transport import (
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
    TransferTimeout,
    Transport,
    TransportError,
    TransportOptions,
    Unsupported,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAGIC = b"datadist sockets 1"
HEADER = struct.Struct("=cq")
READ, WRITE, GOOD, OUTSIDE, FORBIDDEN = b"r", b"w", b"g", b"o", b"f"
CLOSE_SECONDS = 5.0
PIECE = 100 << 10


class SocketLink(Link):
    """See :class:`datadist.transport.Link`."""

    def __init__(self, group: Group, regions: Sequence[Region], access: Access) -> None:
        self._spans = [(region.address, region.address + region.size) for region in regions]
        self._access = access
        self._paths: dict[int, socket.socket] = {}
        self._busy = {rank: threading.Lock() for rank in group.peers}
        self._ended: dict[int, str] = {}
        """Why a rank can not be reached any more."""
        self._servers: list[tuple[socket.socket, threading.Thread]] = []

    def offer(self, rank: int) -> Offer:
        """One end of a pair of sockets; a thread of ours answers on the other."""
        ours, theirs = socket.socketpair()
        thread = threading.Thread(target=self._serve, args=(ours,), daemon=True)
        thread.start()
        self._servers.append((ours, thread))
        return Offer(MAGIC, [theirs.detach()])

    def attach(self, rank: int, offer: Offer) -> None:
        """Keep the peer's end."""
        sockets = [socket.socket(fileno=fd) for fd in offer.fds]
        if offer.data != MAGIC or len(sockets) != 1 or rank in self._paths:
            for sock in sockets:
                sock.close()
            raise LinkError(f"rank {rank} did not offer one socket of {MAGIC.decode()!r}", rank)
        self._paths[rank] = sockets[0]

    def read(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        """Ask for the bytes, and put them where they belong."""
        self._request(READ, rank, local, remote, length, timeout)

    def write(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        """Ask for leave, send the bytes, and wait until they are in place."""
        self._request(WRITE, rank, local, remote, length, timeout)

    def _request(
        self, kind: bytes, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        with self._busy[rank]:
            if rank in self._ended or rank not in self._paths:
                raise TransferError(self._ended.get(rank, f"rank {rank} was not attached"))
            wire = Wire(self._paths[rank], time.monotonic() + timeout)
            try:
                answer = self._ask(wire, kind, local, remote, length)
            except OSError as error:
                failure = self._failure(rank, error, timeout)
                if wire.is_sending_memory:
                    failure.in_flight = Unread(self._paths[rank])
                raise failure from None
        if answer == OUTSIDE:
            raise AddressError(f"a segment is not within the memory that rank {rank} offered")
        if answer == FORBIDDEN:
            raise Unsupported(f"rank {rank} granted read access only")

    def _failure(self, rank: int, error: OSError, timeout: float) -> TransportError:
        if isinstance(error, TimeoutError):
            self._end(rank, f"a request to rank {rank} took too long before")
            return TransferTimeout(f"not complete after {timeout:g} s")
        if rank in self._ended:
            return TransferError(self._ended[rank])
        self._end(rank, f"rank {rank} is gone: {error}")
        return PeerLost(self._ended[rank], rank)

    def _ask(self, wire: Wire, kind: bytes, local: Buffer, remote: Buffer, length: Buffer) -> bytes:
        sizes = _numbers(length)
        wire.send(HEADER.pack(kind, len(sizes)) + bytes(remote) + bytes(length))
        answer = wire.receive(1)
        if answer == GOOD and kind == READ:
            wire.receive_memory(_numbers(local), sizes)
        elif answer == GOOD:
            wire.is_sending_memory = True
            wire.send_memory(_numbers(local), sizes)
            wire.receive(1)
        return answer

    def _serve(self, sock: socket.socket) -> None:
        """Answer one peer until it leaves, or we close."""
        wire = Wire(sock, None)
        try:
            while True:
                kind, count = HEADER.unpack(wire.receive(HEADER.size))
                addresses, sizes = (_numbers(wire.receive(8 * count)) for _ in range(2))
                self._answer(wire, kind, addresses, sizes)
        except OSError:
            _shut(sock)

    def _answer(self, wire: Wire, kind: bytes, addresses: list[int], sizes: list[int]) -> None:
        answer = self._check_request(kind, addresses, sizes)
        wire.send(answer)
        if answer == GOOD and kind == READ:
            wire.send_memory(addresses, sizes)
        elif answer == GOOD:
            wire.receive_memory(addresses, sizes)
            wire.send(GOOD)

    def _check_request(self, kind: bytes, addresses: list[int], sizes: list[int]) -> bytes:
        if kind == WRITE and self._access is Access.READ:
            return FORBIDDEN
        for address, size in zip(addresses, sizes, strict=True):
            if not any(begin <= address and address + size <= end for begin, end in self._spans):
                return OUTSIDE
        return GOOD

    def _end(self, rank: int, reason: str) -> None:
        self._ended.setdefault(rank, reason)
        if rank in self._paths:
            _shut(self._paths[rank])

    def abort(self, rank: int) -> None:
        """Wake the request in flight, and refuse those to come."""
        self._end(rank, "the link was aborted or closed")

    def close(self) -> frozenset[int]:
        """End paths and threads. Nobody writes our memory but those threads: nobody is named."""
        for rank in self._busy:
            self.abort(rank)
        for sock, _ in self._servers:
            _shut(sock)
        for sock, thread in self._servers:
            thread.join(CLOSE_SECONDS)
            sock.close()
        for rank, sock in self._paths.items():
            with self._busy[rank]:
                sock.close()
        return frozenset()


class SocketTransport(Transport):
    """Sockets between processes of one host; HOST and DEVICE are labels on memory of the host."""

    api_version: ClassVar[int] = 2
    priority: ClassVar[int] = 0

    @classmethod
    def probe(cls) -> Availability:
        """Usable wherever Python runs on Linux."""
        return Availability(True, "sockets between processes of this host")

    def __init__(self, options: TransportOptions) -> None:
        if options.extra:
            raise TransportError(f"unknown option {min(options.extra)}: there are none")

    @property
    def capabilities(self) -> Capabilities:
        """All there is, but the owner must run for others to reach its memory."""
        both = frozenset(Placement)
        return Capabilities(
            placements=both, foreign_memory=True, same_host_only=True, host_addressable=both,
            passive_target=False,
        )  # fmt: skip

    def allocate(self, size: int, placement: Placement) -> Region:
        """Anonymous memory, which goes with the region and its keeper."""
        try:
            keeper = (ctypes.c_char * size).from_buffer(mmap.mmap(-1, size))
        except (OSError, OverflowError, ValueError) as error:
            raise MemoryError(f"{size} bytes: {error}") from error
        return Region(ctypes.addressof(keeper), size, placement, keeper)

    def register(self, address: int, size: int, placement: Placement) -> Region:
        """Any memory of the process; msync says whether it is there."""
        first = address & -mmap.PAGESIZE
        area = ctypes.c_void_p(first), ctypes.c_size_t(address + size - first)
        if ctypes.CDLL(None).msync(*area, 1):  # MS_ASYNC changes nothing
            raise RegistrationError(f"the {size} bytes at {address:#x} are not mapped here")
        return Region(address, size, placement)

    def release(self, region: Region) -> None:
        """The memory goes with its last user."""
        region.keeper = None

    def open(self, group: Group, regions: Sequence[Region], access: Access) -> SocketLink:
        """Nothing to prepare: each offer makes its own sockets."""
        return SocketLink(group, regions, access)

    def close(self) -> None:
        """Nothing is held beyond links and regions."""


class Wire:
    """A socket on which every wait ends by ``deadline`` (time.monotonic); None: waits for good.

    Its methods raise ``TimeoutError``, and ``OSError`` where the other end is gone.
    """

    def __init__(self, sock: socket.socket, deadline: float | None) -> None:
        self._sock = sock
        self._deadline = deadline
        self.is_sending_memory = False

    def _arm(self) -> None:
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._sock.settimeout(left)

    def send(self, data: bytes) -> None:
        """Send all of it."""
        self._arm()
        self._sock.sendall(data)

    def receive(self, size: int) -> bytes:
        """Exactly ``size`` bytes."""
        data = bytearray(size)
        self._fill(memoryview(data))
        return bytes(data)

    def send_memory(self, addresses: list[int], sizes: list[int]) -> None:
        """What lies at these addresses, about PIECE bytes at a time."""
        piece = b""
        for address, size in zip(addresses, sizes, strict=True):
            for at in range(0, size, PIECE):
                piece += ctypes.string_at(address + at, min(PIECE, size - at))
                if len(piece) >= PIECE:
                    self.send(piece)
                    piece = b""
        self.send(piece)

    def receive_memory(self, addresses: list[int], sizes: list[int]) -> None:
        """Put what comes at these addresses."""
        for address, size in zip(addresses, sizes, strict=True):
            self._fill(memoryview((ctypes.c_char * size).from_address(address)).cast("B"))

    def _fill(self, rest: memoryview) -> None:
        while rest:
            self._arm()
            count = self._sock.recv_into(rest)
            if count == 0:
                raise ConnectionError("it has closed the connection")
            rest = rest[count:]


class Unread:
    """What the owner has not read of a failed write (:class:`datadist.transport.InFlight`)."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock: socket.socket | None = sock.dup()

    def settled(self) -> bool:
        """Whether the owner has put all that was sent into its memory, or has closed its end."""
        if self._sock is not None and not _unread(self._sock):
            self._sock.close()
            self._sock = None
        return self._sock is None


def _unread(sock: socket.socket) -> int:
    count: int = struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0]
    return count


def _shut(sock: socket.socket) -> None:
    """Wake whoever waits on the socket, here and at the peer."""
    with contextlib.suppress(OSError):  # it was shut before
        sock.shutdown(socket.SHUT_RDWR)


def _numbers(vector: Buffer) -> list[int]:
    return memoryview(vector).cast("B").cast("q").tolist()

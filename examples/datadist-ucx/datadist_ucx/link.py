"""One communication domain: requests to the peers, and a thread per peer that answers theirs.

UCX could read the peer's memory by itself, but over TCP that is emulated by the peer's process, asks
nobody for permission, and cannot be taken back. So the owner moves the bytes: it checks every
request, and when its threads have ended nothing can land any more.

A request is a secret from the owner's offer, its kind and the number of segments; then the owner's
addresses and the lengths. The answer is one byte; then the data follows, and for a write one more byte.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from datadist.base.texts import in_seconds
from datadist.transport import (
    Access,
    AddressError,
    Group,
    Link,
    LinkError,
    Offer,
    PeerLost,
    Region,
    TransferError,
    TransferTimeout,
    Unsupported,
)
from datadist_ucx.loop import Ended, Loop
from datadist_ucx.stream import Segment, Stream

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger("datadist.ucx")

FORMAT = 1
SECRET_BYTES = 16
HEADER = struct.Struct(f"<{SECRET_BYTES}scq")
READ, WRITE, GOOD, OUTSIDE, FORBIDDEN = b"r", b"w", b"g", b"o", b"f"
ASK, ANSWER = 1 << 32, 2 << 32
"""Tags: what is said, and the rank that says it."""
MAX_SEGMENTS = 1 << 24
CLOSE_SECONDS = 5.0


@dataclass(eq=False)
class _Path:
    """Our way to one peer's memory."""

    rank: int
    secret: bytes
    """From the peer's offer."""
    endpoint: Any
    ended: str | None = None
    busy: threading.Lock = field(default_factory=threading.Lock)
    stream: Stream | None = None


class UcxLink(Link):
    """See :class:`datadist.transport.Link`."""

    def __init__(
        self, group: Group, regions: Sequence[Region], access: Access, context: Any
    ) -> None:
        self._group = group
        self._spans = [(region.address, region.address + region.size) for region in regions]
        self._access = access
        self._loop = Loop(context)
        self._secrets: dict[int, bytes] = {}
        self._paths: dict[int, _Path] = {}
        self._servers: list[threading.Thread] = []
        self._closing = threading.Lock()
        self._closed = False

    def offer(self, rank: int) -> Offer:
        """The address of our worker, and the secret that requests must carry."""
        secret = self._secrets.setdefault(rank, secrets.token_bytes(SECRET_BYTES))
        return Offer(_seal({"address": self._loop.address.hex(), "secret": secret.hex()}))

    def attach(self, rank: int, offer: Offer) -> None:
        """Connect to the peer's worker, and begin to answer it."""
        if rank in self._paths:
            raise LinkError(f"rank {rank} was attached before", rank)
        fields = _open(rank, offer.data)
        try:
            endpoint = self._loop.connect(bytes.fromhex(fields["address"]))
        except Ended as error:
            raise LinkError(f"rank {rank} cannot be reached: {error}", rank) from None
        path = _Path(rank, bytes.fromhex(fields["secret"]), endpoint)
        me = self._group.rank
        path.stream = Stream(self._loop, endpoint, ASK | me, ANSWER | rank, lambda: path.ended)
        answers = Stream(self._loop, endpoint, ANSWER | me, ASK | rank, lambda: None)
        thread = threading.Thread(target=self._serve, args=(rank, answers), daemon=True)
        self._paths[rank] = path
        thread.start()
        self._servers.append(thread)

    # -- asking ------------------------------------------------------------------------------

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
        path = self._paths.get(rank)
        if path is None:
            raise TransferError(f"rank {rank} was not attached")
        with path.busy:
            if path.ended:
                raise TransferError(path.ended)
            assert path.stream is not None
            path.stream.deadline = time.monotonic() + timeout
            try:
                answer = _ask(path.stream, path.secret, kind, local, remote, length)
            except TimeoutError:
                path.ended = f"a request to rank {rank} took too long before"
                raise TransferTimeout(f"not complete after {in_seconds(timeout)}") from None
            except Ended as error:
                raise self._lost(path, error) from None
        if answer == OUTSIDE:
            raise AddressError(f"a segment is not within the memory that rank {rank} offered")
        if answer == FORBIDDEN:
            raise Unsupported(f"rank {rank} granted read access only")

    def _lost(self, path: _Path, error: Ended) -> TransferError:
        if path.ended or self._closed:
            return TransferError(path.ended or "this link is closed")
        path.ended = f"rank {path.rank} is gone: {error}"
        return PeerLost(path.ended, path.rank)

    # -- answering ---------------------------------------------------------------------------

    def _serve(self, rank: int, stream: Stream) -> None:
        """Answer one peer until it leaves, or we close."""
        try:
            while True:
                secret, kind, count = HEADER.unpack(stream.receive(HEADER.size))
                if not secrets.compare_digest(secret, self._secrets.get(rank, b"")):
                    log.warning("a request in the name of rank %d had a wrong secret", rank)
                    return
                if not 0 < count <= MAX_SEGMENTS:
                    log.warning("a request of rank %d has %d segments", rank, count)
                    return
                segments = _segments(stream.receive(8 * count), stream.receive(8 * count))
                self._answer(stream, kind, segments)
        except Ended:
            return

    def _answer(self, stream: Stream, kind: bytes, segments: list[Segment]) -> None:
        answer = self._check_request(kind, segments)
        stream.send(answer)
        if answer == GOOD and kind == READ:
            stream.send_memory(segments)
        elif answer == GOOD:
            stream.receive_memory(segments)
            stream.send(GOOD)

    def _check_request(self, kind: bytes, segments: list[Segment]) -> bytes:
        if kind != READ and (kind != WRITE or self._access is Access.READ):
            return FORBIDDEN
        for address, size in segments:
            end = address + size
            if size <= 0 or not any(a <= address and end <= b for a, b in self._spans):
                return OUTSIDE
        return GOOD

    # -- the end -----------------------------------------------------------------------------

    def abort(self, rank: int) -> None:
        """Wake the request in flight, and refuse those to come."""
        path = self._paths.get(rank)
        if path is not None:
            path.ended = path.ended or "the link was aborted or closed"
            with self._loop.changed:
                self._loop.changed.notify_all()

    def close(self) -> frozenset[int]:
        """End threads and worker. Nobody writes our memory but those threads: nobody is named."""
        with self._closing:
            if self._closed:
                return frozenset()
            self._closed = True
            for rank in self._paths:
                self.abort(rank)
            self._loop.stop()
            for thread in self._servers:
                thread.join(CLOSE_SECONDS)
            for path in self._paths.values():
                with path.busy:
                    path.endpoint = path.stream = None
            self._servers.clear()
            self._loop.close()
        return frozenset()


def _ask(
    stream: Stream, secret: bytes, kind: bytes, local: Buffer, remote: Buffer, length: Buffer
) -> bytes:
    segments = _segments(local, length)
    stream.send(HEADER.pack(secret, kind, len(segments)))
    stream.send(bytes(remote))
    stream.send(bytes(length))
    answer = stream.receive(1)
    if answer == GOOD and kind == READ:
        stream.receive_memory(segments)
    elif answer == GOOD:
        stream.send_memory(segments)
        stream.receive(1)
    return answer


def _segments(addresses: Buffer, lengths: Buffer) -> list[Segment]:
    first, second = (memoryview(v).cast("B").cast("q").tolist() for v in (addresses, lengths))
    return list(zip(first, second, strict=True))


def _digest(fields: dict[str, str]) -> str:
    return hashlib.sha256(f"{fields['address']} {fields['secret']}".encode()).hexdigest()


def _seal(fields: dict[str, str]) -> bytes:
    return json.dumps({"format": FORMAT, **fields, "digest": _digest(fields)}).encode()


def _open(rank: int, data: bytes) -> dict[str, str]:
    """The fields of an offer. The digest is there because UCX trusts the addresses it is given."""
    try:
        fields: dict[str, Any] = json.loads(data)
        form, whole = fields["format"], fields["digest"] == _digest(fields)
    except (ValueError, KeyError, TypeError) as error:
        raise LinkError(f"the offer of rank {rank} is not one of this transport", rank) from error
    if form != FORMAT or not whole:
        raise LinkError(
            f"the offer of rank {rank} has format {form!r}, expected {FORMAT}, or is damaged", rank
        )
    return fields

"""Small blobs of any length over HCCL's exchange of fixed descriptors.

The first descriptor carries the length and the beginning, in a second exchange the rest follows in
as many as it takes. The library writes as many descriptors as the peer sends, whatever room there is:
the room here covers the largest blob.
"""

from __future__ import annotations

import struct

from datadist.transport import TransportError
from datadist_hccl import abi
from datadist_hccl.one_sided import Hccl

MAX_BYTES = 64 << 10
HEADER = struct.Struct("<4sI")
MAGIC = b"DDX1"
FIRST_BYTES = abi.BLOB_BYTES - HEADER.size
ROOM = -(-MAX_BYTES // abi.BLOB_BYTES) + 1


def swap(hccl: Hccl, communicator: int, own: int, rank: int, data: bytes, seconds: int) -> bytes:
    """Give ``data`` to ``rank``, which does the same; its data.

    Raises :class:`TransportError` where the peers cannot understand each other, :class:`HcclError`.
    """
    if len(data) > MAX_BYTES:
        raise TransportError(f"{len(data)} bytes are too many to exchange: at most {MAX_BYTES}")
    first = HEADER.pack(MAGIC, len(data)) + data[:FIRST_BYTES]
    answer = _only(rank, hccl.exchange(communicator, own, rank, [first], ROOM, seconds))
    magic, size = HEADER.unpack_from(answer)
    if magic != MAGIC or size > MAX_BYTES:
        raise TransportError(f"rank {rank} exchanges data in another form (another release?)")
    if max(size, len(data)) <= FIRST_BYTES:
        return answer[HEADER.size : HEADER.size + size]
    chunks = _chunks(data[FIRST_BYTES:])
    rest = hccl.exchange(communicator, own, rank, chunks, ROOM, seconds)
    whole = answer[HEADER.size :] + b"".join(rest)
    if len(whole) < size:
        raise TransportError(f"rank {rank} announced {size} bytes and sent {len(whole)}")
    return whole[:size]


def _chunks(data: bytes) -> list[bytes]:
    """At least one, since an empty exchange may not be possible."""
    size = abi.BLOB_BYTES
    return [data[at : at + size] for at in range(0, max(1, len(data)), size)]


def _only(rank: int, answer: list[bytes]) -> bytes:
    if len(answer) != 1:
        raise TransportError(f"rank {rank} sent {len(answer)} descriptors, expected one")
    return answer[0]

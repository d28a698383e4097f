"""Work requests in memory: vectors of segments become chains of C structures, without a loop.

The arrays have the layout of ``ibv_send_wr`` and ``ibv_sge`` and are handed to the device as they are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from datadist_rdma import verbs
from datadist_rdma.memory import Vector

if TYPE_CHECKING:
    from typing_extensions import Buffer

PIECE = 1 << 20
"""Longest work request in bytes; short, so that requests in flight end soon after an abort."""
CHAIN = 256
DEPTH = 1024
"""Work requests in one chain, and in flight. Many, since each post may have to wait for the GIL."""
CHAIN_BYTES = PIECE
"""A chain is no longer than this, so that 4 MiB at most are in flight per transfer."""
MAX_SHORT_CHAIN = 4
"""Up to this number of segments a transfer does not use vectors."""
BATCH = 1024
"""Work requests built at a time; bounds the memory of a transfer."""

REQUEST = np.dtype(
    {
        "names": [
            "wr_id", "next", "sg_list", "num_sge", "opcode", "send_flags", "remote_addr", "rkey",
        ],
        "formats": ["u8", "u8", "u8", "i4", "i4", "u4", "u8", "u4"],
        "offsets": [0, 8, 16, 24, 28, 32, 40, 48],
        "itemsize": 128,
    }
)  # fmt: skip
ELEMENT = np.dtype([("addr", "u8"), ("length", "u4"), ("lkey", "u4")])


class Segments(NamedTuple):
    """What is to be moved, in work requests: int64 vectors of addresses and bytes."""

    local: Vector
    remote: Vector
    length: Vector


def segments(local: Buffer, remote: Buffer, length: Buffer, piece: int) -> Segments:
    """The segments of a call, those longer than ``piece`` bytes in several."""
    whole = Segments(*(np.frombuffer(buffer, np.int64) for buffer in (local, remote, length)))
    if int(whole.length.max()) <= piece:
        return whole
    counts = -(-whole.length // piece)
    origin = np.repeat(np.arange(len(counts)), counts)
    before = np.cumsum(counts) - counts
    offset = (np.arange(len(origin)) - before[origin]) * piece
    return Segments(
        whole.local[origin] + offset,
        whole.remote[origin] + offset,
        np.minimum(piece, whole.length[origin] - offset),
    )


def short_chain(parts: Sequence[tuple[int, int, int, int, int]], opcode: int) -> Iterator[Chain]:
    """One chain of few requests: local address, remote address, bytes, local key, remote key each.

    Vectors cost some 70 us however short they are; this costs 3 us a request.
    """
    count = len(parts)
    requests = (verbs.SendRequest * count)()
    elements = (verbs.ScatterGather * count)()
    first, element = ctypes.addressof(requests), ctypes.addressof(elements)
    for number, (local, remote, length, lkey, rkey) in enumerate(parts):
        elements[number] = verbs.ScatterGather(local, length, lkey)
        request = requests[number]
        request.wr_id, request.num_sge, request.opcode = number, 1, opcode
        request.sg_list = element + number * ELEMENT.itemsize
        request.rdma.remote_addr, request.rdma.rkey = remote, rkey
        if number < count - 1:
            request.next = first + (number + 1) * REQUEST.itemsize
        else:
            request.send_flags = verbs.SEND_SIGNALED
    yield Chain(first, 0, count)
    del elements  # the requests point into it


def chain_length(longest: int) -> int:
    """Work requests per chain, for requests of at most ``longest`` bytes."""
    return max(1, min(CHAIN, CHAIN_BYTES // longest))


class Chain(NamedTuple):
    """Work requests ``first`` to ``end - 1``, linked; the last one reports its completion."""

    address: int
    first: int
    end: int


def chains(
    parts: Segments,
    lkeys: NDArray[np.uint32],
    rkeys: NDArray[np.uint32],
    opcode: int,
    length: int,
) -> Iterator[Chain]:
    """The chains of ``length`` requests that move all parts; each is valid until the next is asked for.

    The number of a request in the whole transfer is its ``wr_id``.
    """
    for start in range(0, len(parts.local), BATCH):
        part = slice(start, start + BATCH)
        requests, elements = _build(
            Segments(*(vector[part] for vector in parts)), lkeys[part], rkeys[part], opcode, length
        )
        requests["wr_id"] += start
        base, count = requests.ctypes.data, len(requests)
        for first in range(0, count, length):
            end = min(first + length, count)
            yield Chain(base + first * REQUEST.itemsize, start + first, start + end)
        del elements  # the requests point into it


def _build(
    parts: Segments,
    lkeys: NDArray[np.uint32],
    rkeys: NDArray[np.uint32],
    opcode: int,
    length: int,
) -> tuple[NDArray[np.void], NDArray[np.void]]:
    count = len(parts.local)
    numbers = np.arange(count, dtype=np.uint64)
    elements = np.empty(count, ELEMENT)
    elements["addr"], elements["length"], elements["lkey"] = parts.local, parts.length, lkeys
    requests = np.zeros(count, REQUEST)
    requests["wr_id"] = numbers
    requests["next"] = (numbers + np.uint64(1)) * np.uint64(REQUEST.itemsize) + np.uint64(
        requests.ctypes.data
    )
    requests["sg_list"] = numbers * np.uint64(ELEMENT.itemsize) + np.uint64(elements.ctypes.data)
    requests["num_sge"], requests["opcode"] = 1, opcode
    requests["remote_addr"], requests["rkey"] = parts.remote, rkeys
    for last in (slice(length - 1, None, length), slice(count - 1, count)):
        requests["next"][last] = 0
        requests["send_flags"][last] = verbs.SEND_SIGNALED
    return requests, elements

"""The messages between an asker and an owner; what arrives from an asker is checked here.

A connection serves the transfers of one asker, the process that called read or write, with one owner.
All numbers are little-endian.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from datadist_nixl.memory import Vector

MAGIC = b"datadist nixl 1\n"
SECRET_BYTES = 16
GREETING_BYTES = 32
MAX_SEGMENTS = 4096
MAX_PIECE = 32 << 20
"""Most segments and bytes of one request."""
MAX_REASON = 300
MEMORIES = ("DRAM", "VRAM")
"""Memory types of NIXL, by their number here."""

_HELLO = struct.Struct(f"<{len(MAGIC)}s{GREETING_BYTES}s")
_REQUEST = struct.Struct(f"<{SECRET_BYTES}sIHBx")
_GENERATION = struct.Struct("<I")

MAX_REQUEST = _REQUEST.size + 24 * MAX_SEGMENTS
MAX_METADATA = 64 << 20
HELLO_BYTES = _HELLO.size


class WireError(Exception):
    """Bytes that are no message of this format; the text says why."""


class Kind(IntEnum):
    """What a message is; its number is that of the request."""

    HELLO = 1
    """The first one: the greeting of an offer of the owner."""
    MEMORY = 2
    """The asker's memory, for the owner to write to: generation and metadata of NIXL."""
    READ = 3
    """Write these ranges of yours to those of mine."""
    WRITE = 4
    """May I write these ranges of yours?"""
    WRITTEN = 5
    """That write has ended."""
    FENCE = 6
    """End all writes to your memory that were allowed; the number is free."""
    TARGET = 7
    """The owner's memory, for the asker to write to: generation and metadata of NIXL."""
    GO = 8
    """The write is allowed."""
    DONE = 9
    """The read has ended: every byte is in place."""
    REFUSED = 10
    """Not done: a :class:`Refusal`, and a text."""
    FENCED = 11
    """Answer to FENCE: nothing that was allowed before touches memory any more."""


class Refusal(IntEnum):
    """Why a request was not served."""

    OUTSIDE = 1
    FORBIDDEN = 2
    CLOSED = 3
    FAILED = 4
    """NIXL failed, or the connection of NIXL was given up: ask again, over new agents."""


@dataclass(frozen=True)
class Request:
    """The body of READ and WRITE."""

    secret: bytes
    memory: str
    device: int
    """Of the asker's memory."""
    here: Vector
    """Addresses of the receiver, who owns that memory."""
    there: Vector
    """Addresses of the sender; empty for WRITE."""
    length: Vector


def hello(greeting: bytes) -> bytes:
    """The body of HELLO."""
    return _HELLO.pack(MAGIC, greeting)


def parse_hello(body: memoryview) -> bytes:
    """The greeting. Raises :class:`WireError`."""
    if len(body) != _HELLO.size:
        raise WireError(f"a greeting has {len(body)} bytes, expected {_HELLO.size}")
    magic, greeting = _HELLO.unpack(body)
    if magic != MAGIC:
        raise WireError(f"a greeting begins with {magic!r}, expected {MAGIC!r}")
    return bytes(greeting)


def pack_request(secret: bytes, memory: str, device: int, vectors: tuple[Vector, ...]) -> bytes:
    """The body of READ or WRITE; ``vectors``: theirs, ours (not for WRITE), length."""
    fixed = _REQUEST.pack(secret, len(vectors[0]), device, MEMORIES.index(memory))
    return b"".join((fixed, *map(_bytes, vectors)))


def parse_request(body: memoryview, columns: int) -> Request:
    """A request of two or three vectors. Raises :class:`WireError`."""
    if len(body) < _REQUEST.size:
        raise WireError(f"a request has {len(body)} bytes, at least {_REQUEST.size} are needed")
    secret, count, device, memory = _REQUEST.unpack_from(body)
    if not 0 < count <= MAX_SEGMENTS or len(body) != _REQUEST.size + 8 * columns * count:
        raise WireError(f"a request of {count} segments has {len(body)} bytes")
    if memory >= len(MEMORIES):
        raise WireError(f"a request is for memory of type {memory}, which does not exist")
    table = np.frombuffer(body, "<i8", offset=_REQUEST.size).reshape(columns, count)
    here, length = table[0], table[-1]
    there = table[1] if columns == 3 else table[0]
    if count == 1:  # much faster than reductions of one element
        lowest, least, most, size = int(there[0]), *([int(length[0])] * 3)
    else:
        lowest, least = int(there.min()), int(length.min())
        most, size = int(length.max()), int(length.sum())
    if least <= 0 or most > MAX_PIECE or size > MAX_PIECE:
        raise WireError(f"a request is for {size} bytes, 1 to {MAX_PIECE} are possible")
    if lowest < 0:
        raise WireError(f"a request has the address {lowest}")
    return Request(secret, MEMORIES[memory], device, here, there, length)


def pack_metadata(generation: int, metadata: bytes) -> bytes:
    """The body of MEMORY or TARGET."""
    return _GENERATION.pack(generation & 0xFFFFFFFF) + metadata


def parse_metadata(body: memoryview) -> tuple[int, bytes]:
    """Generation and metadata. Raises :class:`WireError`."""
    if len(body) <= _GENERATION.size:
        raise WireError(f"metadata of {len(body)} bytes")
    return _GENERATION.unpack_from(body)[0], bytes(body[_GENERATION.size :])


def pack_refusal(refusal: Refusal, text: str) -> bytes:
    """The body of REFUSED."""
    return bytes([refusal]) + text.encode()[:MAX_REASON]


def parse_refusal(body: memoryview) -> tuple[Refusal, str]:
    """Raises :class:`WireError`."""
    try:
        return Refusal(body[0]), bytes(body[1:]).decode(errors="replace")
    except (IndexError, ValueError):
        raise WireError(f"a refusal is {bytes(body[:8])!r}") from None


def _bytes(vector: Vector) -> bytes:
    return vector.tobytes() if sys.byteorder == "little" else vector.astype("<i8").tobytes()

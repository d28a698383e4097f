"""The messages between two processes, and the offers; everything that arrives is checked here.

A message is a header and a body. The header names the receiver by a secret that it drew itself: the
secret of one side of a link, which only the peer of that side was offered (HELLO, READ, WRITE,
CLOSED), or that of a session, which only peers that were greeted know (the answers DATA, DONE and
REFUSED, and BYE). All numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from datadist.messaging.pieces import MAX_SEGMENTS, MIN_PIECE
from datadist.transport import Offer

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "HEADER_BYTES",
    "MAX_BESIDE",
    "SECRET_BYTES",
    "Header",
    "Kind",
    "OfferFields",
    "Refusal",
    "Request",
    "WireError",
    "pack",
    "pack_request",
    "parse_header",
    "parse_offer",
    "parse_request",
    "seal_offer",
]

SECRET_BYTES = 16
MAGIC = b"ddm1"
_HEADER = struct.Struct(f"<4sB3x{SECRET_BYTES}sQ")
_REQUEST = struct.Struct(f"<{SECRET_BYTES}sIIHxx")
HEADER_BYTES = _HEADER.size
MAX_TARGET = 1 << 10
MAX_BESIDE = HEADER_BYTES + _REQUEST.size + MAX_TARGET + 16 * MAX_SEGMENTS
"""Most bytes of a message beside the data: an engine carries messages of ``piece`` and these."""
MAX_MILLISECONDS = (1 << 32) - 1
MAX_ADDRESS = 1 << 16
MAX_REASON = 200

_OFFER_MAGIC = b"datadist messaging offer 1\n"
_OFFER = struct.Struct(f"<?{SECRET_BYTES}sIIII")
_DIGEST_BYTES = 32


class WireError(Exception):
    """Bytes that are no message or offer of this format; the text says why."""


class Kind(IntEnum):
    """What a message is."""

    HELLO = 1
    """The sender has attached our offer, and can answer; with the secrets of its session and its side.
    The number says when the session began, by the sender's clock."""
    READ = 2
    WRITE = 3
    DATA = 4
    """Answer to READ, with the data, unless that was put into the buffer that the request named."""
    DONE = 5
    """Answer to WRITE, when the data is in place; or to READ, after a put."""
    REFUSED = 6
    """Answer to READ and WRITE, with a :class:`Refusal`."""
    CLOSED = 7
    """The sender has ended its side, and asks for nothing any more; with the reason as text. The number
    is 1 where its session has ended as well, and this comes over another connection."""
    BYE = 8
    """To a session: the sender's session, whose secret it has, is not used any more."""


class Refusal(IntEnum):
    """Why a request was refused."""

    OUTSIDE = 1
    FORBIDDEN = 2
    EXPIRED = 3
    CLOSED = 4


@dataclass(frozen=True)
class Header:
    """The start of each message."""

    kind: Kind
    secret: bytes
    number: int
    """Of a request and its answer."""


def pack(
    kind: Kind, secret: bytes, number: int = 0, body: bytes = b"", room: int = 0,
    make: Callable[[int], bytearray] = bytearray,
) -> bytearray:  # fmt: skip
    """A message made by ``make``, with ``room`` more bytes at its end."""
    message = make(_HEADER.size + len(body) + room)
    _HEADER.pack_into(message, 0, MAGIC, kind, secret, number)
    message[_HEADER.size : _HEADER.size + len(body)] = body
    return message


def parse_header(message: Buffer) -> Header:
    """Raises :class:`WireError`."""
    view = memoryview(message)
    if view.nbytes < _HEADER.size:
        raise WireError(f"a message has {view.nbytes} bytes, at least {_HEADER.size} are needed")
    magic, kind, secret, number = _HEADER.unpack_from(view)
    if magic != MAGIC:
        raise WireError(f"a message begins with {magic!r}, expected {MAGIC!r}")
    try:
        return Header(Kind(kind), secret, number)
    except ValueError:
        raise WireError(f"a message has kind {kind}, which does not exist") from None


@dataclass(frozen=True)
class Request:
    """The body of READ and WRITE."""

    reply: bytes
    """Secret of the session to which the answer goes."""
    milliseconds: int
    """Time that the asker has left."""
    addresses: Sequence[int]
    lengths: Sequence[int]
    target: bytes
    """Name of the buffer that takes the data of a READ by a put; empty: the answer has the data."""
    data_at: int
    """Where the data of a WRITE begins in the message."""
    size: int
    """Sum of the lengths."""


def pack_request(
    kind: Kind, secret: bytes, number: int, reply: bytes, seconds: float,
    addresses: array[int], lengths: array[int], target: bytes = b"", room: int = 0,
    make: Callable[[int], bytearray] = bytearray,
) -> bytearray:  # fmt: skip
    """A READ, or a WRITE with ``room`` for the data."""
    milliseconds = min(max(0, int(seconds * 1000)), MAX_MILLISECONDS)
    fixed = _REQUEST.pack(reply, milliseconds, len(addresses), len(target))
    body = fixed + target + _bytes(addresses) + _bytes(lengths)
    return pack(kind, secret, number, body, room, make)


def parse_request(message: Buffer, kind: Kind, most: int) -> Request:
    """The request of a message, for ``most`` bytes of memory at most. Raises :class:`WireError`."""
    view = memoryview(message).cast("B")
    at = _HEADER.size + _REQUEST.size
    if len(view) < at:
        raise WireError(f"a request has {len(view)} bytes, at least {at} are needed")
    reply, milliseconds, count, target_bytes = _REQUEST.unpack_from(view, _HEADER.size)
    if not 0 < count <= MAX_SEGMENTS or target_bytes > MAX_TARGET:
        raise WireError(
            f"a request has {count} segments and a target of {target_bytes} bytes; 1 to "
            f"{MAX_SEGMENTS}, and at most {MAX_TARGET} are possible"
        )
    data_at = at + target_bytes + 16 * count
    if len(view) < data_at:
        raise WireError(f"a request of {count} segments is cut at {len(view)} bytes")
    target, at = bytes(view[at : at + target_bytes]), at + target_bytes
    addresses, lengths = _numbers(view, at, count), _numbers(view, at + 8 * count, count)
    size = sum(lengths)
    if min(lengths) <= 0 or size > most:
        raise WireError(
            f"a request is for {size} bytes, 1 to {most} in positive parts are possible"
        )
    if len(view) - data_at != (size if kind is Kind.WRITE else 0):
        raise WireError(f"a {kind.name} of {size} bytes has {len(view) - data_at} bytes of data")
    return Request(reply, milliseconds, addresses, lengths, target, data_at, size)


@dataclass(frozen=True)
class OfferFields:
    """What an offer says."""

    address: bytes
    secret: bytes
    writable: bool
    piece: int
    window: int
    ranges: Sequence[tuple[int, int]]


def seal_offer(fields: OfferFields) -> bytes:
    """An offer's bytes, with a digest: engines trust the addresses that they are given."""
    fixed = _OFFER.pack(
        fields.writable, fields.secret, fields.piece, fields.window,
        len(fields.address), len(fields.ranges),
    )  # fmt: skip
    edges = array("q", [edge for both in fields.ranges for edge in both])
    content = _OFFER_MAGIC + fixed + fields.address + _bytes(edges)
    return content + hashlib.sha256(content).digest()


def parse_offer(data: bytes) -> OfferFields:
    """Raises :class:`WireError`."""
    content, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if not content.startswith(_OFFER_MAGIC):
        found, expected = bytes(data[: len(_OFFER_MAGIC)]), _OFFER_MAGIC
        raise WireError(f"it has the format {found!r}, expected {expected!r}")
    if hashlib.sha256(content).digest() != digest or len(content) < len(_OFFER_MAGIC) + _OFFER.size:
        raise WireError("it is damaged: its digest is wrong")
    writable, secret, piece, window, address_bytes, count = _OFFER.unpack_from(
        content, len(_OFFER_MAGIC)
    )
    at = len(_OFFER_MAGIC) + _OFFER.size
    if len(content) != at + address_bytes + 16 * count or address_bytes > MAX_ADDRESS:
        raise WireError(f"it has {len(content)} bytes, which its numbers do not match")
    if piece < MIN_PIECE or window < 1:
        raise WireError(
            f"its pieces have {piece} bytes, {window} at a time; at least {MIN_PIECE}, and 1, are needed"
        )
    if count > Offer.MAX_REGIONS:
        raise WireError(f"it has {count} ranges, at most {Offer.MAX_REGIONS} are possible")
    edges = _numbers(memoryview(content), at + address_bytes, 2 * count)
    return OfferFields(
        content[at : at + address_bytes], secret, writable, piece, window, _ranges(edges)
    )


def _ranges(edges: array[int]) -> list[tuple[int, int]]:
    """Pairs of edges, which must rise from 0 on: in order, without overlap, within 63 bits."""
    ranges, before = list(zip(edges[::2], edges[1::2], strict=True)), 0
    for begin, end in ranges:
        if not before <= begin < end:
            raise WireError(
                f"its range from {begin:#x} to {end:#x} is empty, not in order, or overlaps the one "
                f"before, which ends at {before:#x}"
            )
        before = end
    return ranges


def _bytes(values: array[int]) -> bytes:
    if sys.byteorder == "big":
        values = array("q", values)
        values.byteswap()
    return values.tobytes()


def _numbers(view: memoryview, at: int, count: int) -> array[int]:
    values = array("q")
    values.frombytes(view[at : at + 8 * count])
    if sys.byteorder == "big":
        values.byteswap()
    return values

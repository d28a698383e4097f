"""The authenticated channel over TCP: mutual challenge, keys per connection, a MAC per frame.

This module does no I/O. Both ends know the same secret (``DATADIST_AUTH_KEY``). The end that
dialled authenticates first, so that a host without the key learns only a random number:

    dialler                               listener
    greeting (16 bytes), nonce (32)  -->
                                     <--  greeting (16 bytes), nonce (32)
    proof (32)                       -->
                                     <--  proof (32)

All MACs are HMAC-SHA256. The connection's secret is the MAC of both greetings under the key, so
that proofs and frame keys are valid on this connection only. Roles and directions have different
labels, which prevents reflection. Frames are authenticated, not encrypted. Each frame ends with a
MAC over its number, length and body. A frame that was changed, repeated, dropped or reordered is
refused.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from dataclasses import dataclass, field

GREETING = b"datadist-tcp/1\r\n"
"""First bytes of either end; the version is that of this handshake."""

TAG_SIZE = 32
"""Bytes of a MAC."""

_NONCE_SIZE = 32
_HELLO_SIZE = len(GREETING) + _NONCE_SIZE
_COUNTER = struct.Struct(">Q")


class HandshakeError(Exception):
    """The other end failed to authenticate; the text has the reason."""


def _mac(key: bytes, *parts: bytes | bytearray | memoryview) -> bytes:
    return hmac.digest(key, b"".join(parts), "sha256")


class Seal:
    """The MACs of one direction. Both ends count frames, so their counters are equal."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._count = 0

    def next(self, frame: bytes | bytearray | memoryview) -> bytes:
        """The MAC of the next frame."""
        count, self._count = self._count, self._count + 1
        return _mac(self._key, _COUNTER.pack(count), frame)

    def check(self, frame: bytes | bytearray | memoryview, tag: bytes | memoryview) -> bool:
        """Whether ``tag`` is the MAC of ``frame`` as the next one; takes constant time."""
        return hmac.compare_digest(self.next(frame), tag)


@dataclass(frozen=True)
class Seals:
    """The result of a finished handshake: keys for both directions."""

    sending: Seal
    receiving: Seal


@dataclass
class Handshake:
    """One end of the handshake: :meth:`begin`, then :meth:`feed` until ``seals`` is there."""

    key: bytes = field(repr=False)
    dialled: bool
    seals: Seals | None = None

    def __post_init__(self) -> None:
        self._hello = GREETING + secrets.token_bytes(_NONCE_SIZE)
        self._secret: bytes | None = None
        self._inbox = b""

    @property
    def greeted(self) -> bool:
        """Whether all of the other end's greeting has come."""
        return self._secret is not None

    @property
    def wanted(self) -> int:
        """Most bytes to read next; no more is buffered for an unauthenticated peer."""
        if self.seals is not None:
            return 0
        return (_HELLO_SIZE if self._secret is None else TAG_SIZE) - len(self._inbox)

    def begin(self) -> bytes:
        """What to send before anything was received."""
        return self._hello if self.dialled else b""

    def feed(self, data: bytes) -> bytes:
        """Take at most ``wanted`` bytes; returns what to send. Raises :class:`HandshakeError`."""
        self._inbox += data
        if self._secret is None:
            self._check_greeting()
        if self.wanted > 0:
            return b""
        received, self._inbox = self._inbox, b""
        if self._secret is None:
            return self._on_hello(received)
        return self._on_proof(self._secret, received)

    def closed(self) -> str:
        """The reason to report if the peer closes the connection now."""
        if self.dialled and self._secret is not None:
            return (
                "it refused us: it has another DATADIST_AUTH_KEY (set the same key on all ranks), or "
                "too many unauthenticated connections; its log has the reason"
            )
        if self._inbox or self._secret is not None:
            return "it closed the connection in the middle of the handshake"
        return "it closed the connection without an answer (it is no datadist engine, or is busy)"

    def _check_greeting(self) -> None:
        start = self._inbox[: len(GREETING)]
        if start != GREETING[: len(start)]:
            raise HandshakeError(f"it is no datadist engine: it said {start!r}")

    def _on_hello(self, received: bytes) -> bytes:
        both = (self._hello, received) if self.dialled else (received, self._hello)
        self._secret = _mac(self.key, b"datadist connection", *both)
        if self.dialled:
            return _mac(self._secret, b"dialler's proof")
        return self._hello

    def _on_proof(self, secret: bytes, received: bytes) -> bytes:
        theirs = b"listener's proof" if self.dialled else b"dialler's proof"
        if not hmac.compare_digest(_mac(secret, theirs), received):
            raise HandshakeError("it has another DATADIST_AUTH_KEY: set the same key on all ranks")
        out = Seal(_mac(secret, b"dialler to listener"))
        back = Seal(_mac(secret, b"listener to dialler"))
        if self.dialled:
            self.seals = Seals(sending=out, receiving=back)
            return b""
        self.seals = Seals(sending=back, receiving=out)
        return _mac(secret, b"listener's proof")

"""What opens a connection to an owner: each peer process has a greeting of its own, from its offers."""

from __future__ import annotations

import hmac
import secrets

from datadist_nixl.wire import GREETING_BYTES

PEER_BYTES = 16


class Greetings:
    """Makes them, and recognizes them by a signature: none has to be kept, or forgotten."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def make(self) -> bytes:
        """One for a peer."""
        peer = secrets.token_bytes(PEER_BYTES)
        return peer + self._sign(peer)

    def peer_of(self, greeting: bytes) -> bytes | None:
        """The peer whose greeting it is; None where we have not made it."""
        peer = greeting[:PEER_BYTES]
        known = hmac.compare_digest(greeting[PEER_BYTES:], self._sign(peer))
        return peer if known else None

    def _sign(self, peer: bytes) -> bytes:
        return hmac.digest(self._key, peer, "sha256")[: GREETING_BYTES - PEER_BYTES]

"""Messages with which a decoder whose requests wait keeps their blocks at the prefiller."""

from __future__ import annotations

PREFIX = b"datadist-vllm renew "
MAX_KEYS = 256
"""Of one message, which has at most 8 KiB."""


def encode(keys: list[int]) -> list[bytes]:
    """Messages that name the keys of grants."""
    return [
        PREFIX + b" ".join(b"%d" % key for key in keys[begin : begin + MAX_KEYS])
        for begin in range(0, len(keys), MAX_KEYS)
    ]


def decode(message: bytes) -> list[int]:
    """The keys; none for a message that is no renewal."""
    if not message.startswith(PREFIX):
        return []
    words = message[len(PREFIX) :].split()
    return [int(word) for word in words if word.isdigit() and len(word) <= 20]

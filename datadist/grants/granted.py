"""What a reader knows of a grant, and its form as bytes: the token.

The owner answers a question with a token, and applications carry tokens along. So a token is checked
whenever it is read: it holds a digest against damage, which is no proof of who made it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from datadist.caches.directory import KeyName, Space

__all__ = ["MAX_BLOCKS", "MAX_TOKEN", "Granted"]

MAX_BLOCKS = 1 << 17
"""Blocks of one grant: its token has 512 KiB then."""
HEADER = struct.Struct("<4sQ16sQQQQQQII")
"""Magic, cluster, incarnation, generation, address and region of the word, cache, key, model, space,
number of blocks."""
MAGIC = b"ddg1"
DIGEST = 8
BLOCK = np.dtype("<u4")
MAX_TOKEN = HEADER.size + BLOCK.itemsize * MAX_BLOCKS + DIGEST
SPACES: tuple[Space, ...] = ("request", "prefix")


@dataclass(frozen=True, eq=False)
class Granted:
    """One grant as its readers see it."""

    cluster: int
    """The owner's."""
    incarnation: str
    """The owner's; another one has no grant of this engine."""
    generation: int
    """Even, above 0, and never used before by the owner; what the word holds while the grant lives."""
    word_address: int
    """Where the owner's word is; 0 where it has none, then the owner is asked."""
    word_region: int
    """Id of the owner's region that holds the word."""
    cache_id: int
    name: KeyName
    blocks: NDArray[np.int64]
    """Of the owner's cache, in the order of the grant."""

    def encode(self) -> bytes:
        """The token."""
        head = HEADER.pack(
            MAGIC, self.cluster, bytes.fromhex(self.incarnation), self.generation,
            self.word_address, self.word_region, self.cache_id, self.name.key, self.name.model,
            SPACES.index(self.name.space), len(self.blocks),
        )  # fmt: skip
        body = head + self.blocks.astype(BLOCK).tobytes()
        return body + _digest(body)

    @classmethod
    def decode(cls, token: bytes) -> Granted:
        """What a token says. Raises ``ValueError`` that says what is wrong with it."""
        if len(token) < HEADER.size + DIGEST or token[: len(MAGIC)] != MAGIC:
            raise ValueError(f"these {len(token)} bytes are no token of a grant")
        body, digest = token[:-DIGEST], token[-DIGEST:]
        _, cluster, incarnation, generation, word, region, cache, key, model, space, count = (
            HEADER.unpack_from(body)
        )
        if _digest(body) != digest or len(body) != HEADER.size + BLOCK.itemsize * count:
            raise ValueError(f"the token of {len(token)} bytes is damaged")
        if (
            not 0 < count <= MAX_BLOCKS
            or space >= len(SPACES)
            or not _is_possible(generation, word)
        ):
            raise ValueError("the token holds numbers that no grant has")
        return cls(
            cluster, incarnation.hex(), generation, word, region, cache,
            KeyName(SPACES[space], key, model),
            np.frombuffer(body, BLOCK, count, HEADER.size).astype(np.int64),
        )  # fmt: skip


def _is_possible(generation: int, word: int) -> bool:
    return generation > 0 and generation % 2 == 0 and word % 8 == 0 and word < 1 << 63


def _digest(body: bytes) -> bytes:
    return blake2b(body, digest_size=DIGEST).digest()

"""The KV cache of one engine: a blocks cache of its pool, and which blocks are free."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
from llm_datadist import BlocksCacheKey, CacheDesc, DataType, LLMDataDist
from numpy.typing import NDArray

from serving.model import BLOCK_TOKENS, TENSORS, WIDTH

BLOCKS = 64
SHAPE = (BLOCKS, BLOCK_TOKENS, WIDTH)


class NoBlocks(Exception):
    """The cache is full."""


class KvCache:
    """Blocks of the engine's cache; close it before the engine ends."""

    def __init__(self, engine: LLMDataDist) -> None:
        self._manager = engine.cache_manager
        desc = CacheDesc(TENSORS, SHAPE, DataType.DT_FLOAT)
        self.cache = self._manager.allocate_blocks_cache(desc, BlocksCacheKey(engine.cluster_id))
        self._tensors = [_array_at(each) for each in self.cache.tensor_addrs]
        self._free = list(range(BLOCKS))

    @property
    def free_blocks(self) -> int:
        """How many are free."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """So many blocks. Raises :class:`NoBlocks`."""
        if count > len(self._free):
            raise NoBlocks(f"{count} blocks are needed, {len(self._free)} of {BLOCKS} are free")
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def give_back(self, blocks: Sequence[int]) -> None:
        """These are free again."""
        self._free += blocks

    def write(self, blocks: Sequence[int], begin: int, kv: NDArray[np.float32]) -> None:
        """Write the KV of the tokens from position ``begin`` on."""
        for offset in range(kv.shape[1]):
            block, row = divmod(begin + offset, BLOCK_TOKENS)
            for tensor, rows in zip(self._tensors, kv, strict=True):
                tensor[blocks[block], row] = rows[offset]

    def read(self, blocks: Sequence[int], tokens: int) -> NDArray[np.float32]:
        """The KV of the first tokens."""
        found = [tensor[list(blocks)].reshape(-1, WIDTH)[:tokens] for tensor in self._tensors]
        return np.stack(found)

    def close(self) -> None:
        """Free the memory, and remove the key by which others pull."""
        self._tensors = []
        self._manager.deallocate_blocks_cache(self.cache)


def _array_at(address: int) -> NDArray[np.float32]:
    """What lies at the address of a tensor; with NPUs this would be a tensor of theirs."""
    size = 4 * BLOCKS * BLOCK_TOKENS * WIDTH
    memory = (ctypes.c_char * size).from_address(address)
    return np.frombuffer(memory, np.float32).reshape(SHAPE)

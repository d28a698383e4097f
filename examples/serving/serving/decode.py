"""The decode side: pulls the KV of a prompt, or computes it where it cannot be pulled, and generates."""

from __future__ import annotations

from collections.abc import Sequence

from llm_datadist import BlocksCacheKey, LLMDataDist, LLMException

from serving.kv_cache import KvCache
from serving.model import blocks_of, kv_of, next_token
from serving.prefill import Prefilled


class Decode:
    """One engine that decodes."""

    def __init__(self, engine: LLMDataDist) -> None:
        self._manager = engine.cache_manager
        self.kv = KvCache(engine)
        self.recomputed = 0
        """Requests whose KV could not be pulled."""

    def generate(self, request: Prefilled, count: int) -> list[int]:
        """The next ``count`` tokens of a request."""
        tokens = list(request.prompt)
        blocks = self.kv.take(blocks_of(len(tokens) + count))
        try:
            self._fetch(request, blocks)
            for _ in range(count):
                tokens.append(next_token(self.kv.read(blocks, len(tokens))))
                self.kv.write(blocks, len(tokens) - 1, kv_of(tokens, len(tokens) - 1))
        finally:
            self.kv.give_back(blocks)
        return tokens[len(request.prompt) :]

    def _fetch(self, request: Prefilled, blocks: Sequence[int]) -> None:
        source = list(request.blocks)
        key = BlocksCacheKey(request.cluster_id)
        try:
            self._manager.pull_blocks(key, self.kv.cache, source, list(blocks[: len(source)]))
        except LLMException:
            self.recomputed += 1
            self.kv.write(blocks, 0, kv_of(request.prompt))

    def close(self) -> None:
        """Free the cache."""
        self.kv.close()

"""The prefill side: computes the KV of a prompt and keeps it until the decoder has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llm_datadist import LLMDataDist

from serving.kv_cache import KvCache
from serving.model import blocks_of, kv_of


@dataclass(frozen=True)
class Prefilled:
    """What a decoder needs to go on with a request; travels with it."""

    request_id: int
    cluster_id: int
    blocks: tuple[int, ...]
    prompt: tuple[int, ...]


class Prefill:
    """One engine that prefills."""

    def __init__(self, engine: LLMDataDist) -> None:
        self._cluster_id = engine.cluster_id
        self.kv = KvCache(engine)
        self._requests: dict[int, list[int]] = {}

    def prefill(self, request_id: int, prompt: Sequence[int]) -> Prefilled:
        """Compute the KV of a prompt; :meth:`release` frees it."""
        blocks = self.kv.take(blocks_of(len(prompt)))
        self.kv.write(blocks, 0, kv_of(prompt))
        self._requests[request_id] = blocks
        return Prefilled(request_id, self._cluster_id, tuple(blocks), tuple(prompt))

    def release(self, request_id: int) -> None:
        """The decoder has the blocks, or needs them no more."""
        self.kv.give_back(self._requests.pop(request_id))

    def close(self) -> None:
        """Free the cache."""
        self.kv.close()

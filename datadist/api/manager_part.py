"""What the parts of the cache manager share: the engine behind them, and its mode."""

from __future__ import annotations

from collections.abc import Callable

from datadist.api.cache import Cache, is_stranger
from datadist.engine.engine import Engine
from datadist.status import LLMException, LLMStatusCode


class ManagerPart:
    """``live(code)`` is the live engine, or raises LLMException with that code once finalized."""

    def __init__(self, live: Callable[[LLMStatusCode], Engine], one_sided: bool) -> None:
        self._live = live
        self._one_sided = one_sided
        self._linked = False

    def _engine(self) -> Engine:
        """The engine. Raises LLM_PARAM_INVALID once it was finalized."""
        return self._live(LLMStatusCode.LLM_PARAM_INVALID)

    def _engine_with_memory(self) -> Engine:
        """The engine, to make or unregister a cache in. Raises LLM_FAILED once it was finalized."""
        return self._live(LLMStatusCode.LLM_FAILED)

    def _id(self, cache: Cache) -> int:
        """The id of a cache of our engine. Raises LLM_KV_CACHE_NOT_EXIST for one of another engine."""
        if is_stranger(cache, self):
            raise LLMException(
                f"{cache!r} was freed when its engine was finalized: make caches anew after init",
                status_code=LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
            )
        return cache.cache_id

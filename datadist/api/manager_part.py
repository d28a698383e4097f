"""What the parts of the cache manager share: the engine behind them, and its mode."""

from __future__ import annotations

from collections.abc import Callable

from datadist.engine.engine import Engine
from datadist.status import LLMStatusCode


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

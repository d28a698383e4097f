"""What the parts of the cache manager share: the engine behind them, and its mode."""

from __future__ import annotations

from collections.abc import Callable

from datadist.engine.engine import Engine


class ManagerPart:
    """``engine()`` is the live engine, or raises LLMException (LLM_FAILED) once finalized."""

    def __init__(self, engine: Callable[[], Engine], one_sided: bool) -> None:
        self._engine = engine
        self._one_sided = one_sided
        self._linked = False

"""What the parts of the cache manager share: the engine behind them, and its mode."""

from __future__ import annotations

from collections.abc import Callable

from datadist.engine.engine import Engine
from datadist.status import LLMException, LLMStatusCode


class ManagerPart:
    """Bound to an engine until that is finalized (:func:`unbind`), and never to another one.

    ``refusal(code, forked)`` makes the exception for calls afterwards, or in a forked child.
    """

    def __init__(
        self,
        engine: Engine,
        refusal: Callable[[LLMStatusCode, bool], LLMException],
        one_sided: bool,
    ) -> None:
        self._bound: Engine | None = engine
        self._refusal = refusal
        self._one_sided = one_sided
        self._linked = False

    def _engine(self) -> Engine:
        """The engine. Raises LLM_ENGINE_FINALIZED once it was finalized, and in a forked child."""
        engine = self._bound
        if engine is None or engine.over:
            forked = engine is not None and engine.forked
            raise self._refusal(LLMStatusCode.LLM_ENGINE_FINALIZED, forked)
        return engine


def unbind(manager: ManagerPart) -> None:
    """Its engine is finalized."""
    manager._bound = None

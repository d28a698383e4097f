"""The base of the cache manager's mixin classes: access to the engine and its mode."""

from __future__ import annotations

from collections.abc import Callable

from datadist.api.call_options import PreparedTransfer
from datadist.engine.engine import Engine
from datadist.status import LLMException, LLMStatusCode
from datadist.transfers.limits import CallLimit


class ManagerMixin:
    """Bound to one engine until that is finalized (:func:`unbind`).

    ``refusal(code, forked)`` creates the exception for later calls and for calls in a forked child.
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

    def _move(self, prepared: PreparedTransfer, limit: CallLimit, notice: bytes | None) -> None:
        """Move, and then send the message for the other end, if there is one."""
        prepared.move(limit)
        if notice is not None:
            self._engine().notices.notify(notice, limit)


def unbind(manager: ManagerMixin) -> None:
    """Unbind a manager from its finalized engine."""
    manager._bound = None

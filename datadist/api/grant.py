"""A grant, as its owner has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datadist.api.cache import Cache
from datadist.base import checks
from datadist.base.calls import begin, entries
from datadist.base.keywords import named_keywords
from datadist.grants.state import GrantState
from datadist.keys import CacheKey
from datadist.status import LLMException, LLMStatusCode, param_invalid

if TYPE_CHECKING:
    from datadist.engine.engine import Engine

__all__ = ["Grant", "check_lease"]

END_SECONDS = 15.0
"""Longest time that `finalize` takes to end a grant."""


@named_keywords
@entries
class Grant:
    """Blocks of a cache that are open to the readers of a request; made by `grant_blocks`.

    Methods may run in any thread. Dropping the object ends nothing.
    """

    __slots__ = ("__weakref__", "_cache", "_key", "_manager", "_record")

    def __init__(self, manager: Any, key: CacheKey, cache: Cache, record: Any) -> None:
        self._manager = manager
        self._key = key
        self._cache = cache
        self._record = record

    @property
    def key(self) -> CacheKey:
        """The key that was given."""
        return self._key

    @property
    def cache(self) -> Cache:
        """The cache that holds the blocks."""
        return self._cache

    @property
    def blocks(self) -> list[int]:
        """The granted blocks, in their order."""
        blocks: list[int] = self._record.blocks.tolist()
        return blocks

    @property
    def token(self) -> bytes:
        """What an application may carry to a reader, so that `pull_blocks` need not ask the owner.

        Some 100 bytes, and 4 for each block. It says where the blocks are, and is no secret: every
        linked engine may read them.
        """
        engine: Engine = self._manager._engine()
        return engine.grants.token(self._record)

    @property
    def state(self) -> GrantState:
        """GRANTED, or how it ended. Costs nothing; never blocks."""
        state: GrantState = self._record.state
        return state

    def wait(self, timeout_in_millis: int | None = None) -> GrantState:
        """Wait until it has ended; the state, which is GRANTED after ``timeout_in_millis``.

        Raises ``TypeError``, ``ValueError``, and LLMException (LLM_ENGINE_FINALIZED) in a forked child.
        """
        begin("wait")
        if timeout_in_millis is not None:
            checks.check_uint32("timeout_in_millis", timeout_in_millis)
        if self.state is GrantState.GRANTED:
            self._engine_unless_over()
            seconds = None if timeout_in_millis is None else timeout_in_millis / 1000
            self._record.done.wait(seconds)
        return self.state

    def revoke(self) -> GrantState:
        """Take the blocks back: no pull of them succeeds from then on. Does not wait for readers.

        Returns the final state, which is another one than REVOKED where it had ended already.

        Raises LLMException: LLM_FAILED where the device does not let it end, or `finalize` does not
        come to it; the blocks must not be used then. LLM_ENGINE_FINALIZED in a forked child.
        """
        begin("revoke")
        if self.state is GrantState.GRANTED:
            engine = self._engine_unless_over()
            if engine is not None:
                engine.grants.revoke(self._record)
            elif not self._record.done.wait(END_SECONDS):
                raise LLMException(
                    f"finalize did not end the grant of {self._key!r} in {END_SECONDS} s (see the log); "
                    "do not use the blocks",
                    status_code=LLMStatusCode.LLM_FAILED,
                )
        return self.state

    def _engine_unless_over(self) -> Engine | None:
        """None while `finalize` ends the grant. Raises LLM_ENGINE_FINALIZED in a forked child."""
        engine: Engine | None = self._manager._bound
        if engine is None or (engine.over and not engine.forked):
            return None
        live: Engine = self._manager._engine()
        return live

    def renew(self, lease_millis: int | None = None) -> None:
        """Begin a new lease now, of ``lease_millis``, or as long as the last one.

        Raises ``TypeError``, ``ValueError``, and LLMException: LLM_PARAM_INVALID for 0,
        LLM_KV_CACHE_NOT_EXIST once it has ended, LLM_ENGINE_FINALIZED.
        """
        begin("renew")
        if lease_millis is not None:
            check_lease(lease_millis)
        engine = self._manager._engine()
        seconds = self._record.lease if lease_millis is None else lease_millis / 1000
        engine.grants.renew(self._record, seconds)

    def __repr__(self) -> str:
        return f"Grant({self._key!r}, {len(self._record.blocks)} blocks, {self.state.name})"


def check_lease(lease_millis: int) -> None:
    """A positive uint32. Raises ``TypeError``, ``ValueError``, LLM_PARAM_INVALID."""
    checks.check_uint32("lease_millis", lease_millis)
    if not lease_millis:
        raise param_invalid("lease_millis is 0: a lease has at least one millisecond")

"""Grants: the blocks of requests that readers may read here, until they have them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from vllm.logger import init_logger

from datadist import CacheKey, Grant, GrantState, LLMDataDist, LLMException
from datadist_vllm.messages import Finished, Granting
from datadist_vllm.regions import Region

logger = init_logger(f"vllm.{__name__}")

COMPUTING_SECONDS = 3600
"""Lease from the grant to the end of the request. Until then only this instance ends it, or its death."""


@dataclass
class _Held:
    """The grants of one request, one per region."""

    grants: list[Grant]
    lease_millis: int = 0
    """Above 0 once the scheduler keeps the blocks until the grants have ended."""


class Grants:
    """All grants of one worker; used by vLLM's thread only."""

    def __init__(
        self,
        engine: LLMDataDist,
        regions: Sequence[Region],
        parts: int,
        readers: int,
    ) -> None:
        self._engine = engine
        self._regions = regions
        self._parts = parts
        self._readers = readers
        self._held: dict[str, _Held] = {}
        self._by_key: dict[int, str] = {}
        self.ends: Counter[GrantState] = Counter()
        """How grants have ended, since the last look."""

    def grant(self, granting: Granting) -> None:
        """Open the blocks. Where that fails, readers are refused and compute."""
        grants: list[Grant] = []
        try:
            for place, region in enumerate(self._regions if self._readers else ()):
                key = CacheKey(self._engine.cluster_id, granting.key, model_id=place)
                grants.append(
                    self._engine.cache_manager.grant_blocks(
                        region.cache(self._parts), key, granting.blocks,
                        readers=self._readers, lease_millis=COMPUTING_SECONDS * 1000,
                    )
                )  # fmt: skip
        except LLMException as error:
            logger.error("request %s: its blocks are not granted: %s", granting.request_id, error)
        self._held[granting.request_id] = _Held(grants)
        if grants:
            self._by_key[granting.key] = granting.request_id

    def revoke(self, request_id: str) -> None:
        """No read of its blocks succeeds from now on; they may be reused."""
        held = self._held.pop(request_id, None)
        if held is not None:
            for grant in held.grants:
                grant.revoke()

    def finish(self, finished: Finished) -> None:
        """The request has been computed: the lease begins, and its end is to be reported."""
        held = self._held.setdefault(finished.request_id, _Held([]))
        held.lease_millis = int(finished.lease_seconds * 1000)
        for grant in held.grants:
            _renew(grant, held.lease_millis)

    def renew(self, key: int) -> None:
        """A reader waits for its turn: keep the blocks for another lease."""
        held = self._held.get(self._by_key.get(key) or "")
        if held is not None and held.lease_millis:
            for grant in held.grants:
                _renew(grant, held.lease_millis)

    def ended(self) -> set[str]:
        """The finished requests whose blocks nobody can read any more, since the last call."""
        for grant in self._engine.cache_manager.ended_grants():
            self.ends[grant.state] += 1
            request_id = self._by_key.get(grant.key.req_id)
            held = self._held.get(request_id or "")
            if held is None or _are_over(held):  # else it was granted again
                self._by_key.pop(grant.key.req_id, None)
            if grant.state in (GrantState.LAPSED, GrantState.READER_LOST):
                logger.warning(
                    "request %s: no decoder has read its blocks (%s); they are free again",
                    request_id, grant.state.value,
                )  # fmt: skip
        over = {name for name, held in self._held.items() if held.lease_millis and _are_over(held)}
        for name in over:
            del self._held[name]
        return over


def _renew(grant: Grant, millis: int) -> None:
    if grant.state is GrantState.GRANTED:
        try:
            grant.renew(millis)
        except LLMException:  # it ended meanwhile
            return


def _are_over(held: _Held) -> bool:
    return all(grant.state is not GrantState.GRANTED for grant in held.grants)

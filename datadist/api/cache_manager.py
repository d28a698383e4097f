"""The documented `CacheManager`."""

from __future__ import annotations

from datadist.api.allocation import Allocation
from datadist.api.arguments import check_not_none, check_one_id
from datadist.api.copying import Copying
from datadist.api.in_background import InBackground
from datadist.api.layerwise import LayerWise
from datadist.api.pool_tensors import PoolTensors
from datadist.base import checks
from datadist.base.keywords import named_keywords
from datadist.types import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex

__all__ = ["CacheManager"]


@named_keywords
class CacheManager(Allocation, PoolTensors, InBackground, LayerWise, Copying):
    """Caches of one engine; from :attr:`LLMDataDist.cache_manager`. Methods may run in any thread.

    Checks and their order, exceptions and status codes follow the LLM-DataDist API reference
    (CacheManager). ``TypeError`` and ``ValueError`` are for arguments of a wrong type or out of the
    range of their type, :class:`LLMException` with LLM_PARAM_INVALID for wrong values.
    """

    @staticmethod
    def check_cache_key(cache_key: CacheKey | CacheKeyByIdAndIndex | BlocksCacheKey) -> None:
        """Raise ``TypeError`` if it is not a key, LLM_PARAM_INVALID if no pull accepts it.

        No pull accepts a :class:`CacheKey` without exactly one valid id.
        """
        kinds = (CacheKey, CacheKeyByIdAndIndex, BlocksCacheKey)
        checks.check_isinstance("cache_key", cache_key, kinds)
        check_not_none("cache_key", cache_key)
        if isinstance(cache_key, CacheKey):
            check_one_id(cache_key)

    def set_is_call_linked(self) -> None:
        """Note that `link` was called: registered memory is not remote accessible from now on."""
        self._linked = True

    def __repr__(self) -> str:
        mode = "one-sided" if self._one_sided else "two-sided"
        return f"CacheManager({mode})"
